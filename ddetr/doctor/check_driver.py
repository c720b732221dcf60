"""From the facts to rows: the GPUs, the driver, and whether this PyTorch fits both."""

from collections import Counter

from ddetr.doctor.causes import Cause
from ddetr.doctor.check_usable import SECTION, why_unusable
from ddetr.doctor.cures import another_pytorch, newer_driver, newer_pytorch
from ddetr.doctor.facts import Facts, Gpu
from ddetr.doctor.rows import Row, broken, ok, warning
from ddetr.doctor.versions import (
    architecture,
    capability_number,
    least_driver,
    limits_of,
    number,
    range_of,
    runs_on,
    toolkit_drivers,
)


def check_driver(facts: Facts) -> list[Row]:
    """Section 2. Without a usable GPU one row says why, with the most fundamental reason."""
    if facts.cpu:
        return [ok(SECTION, "GPU", "not looked at: --cpu says that none is expected")]
    if problem := why_unusable(facts):
        return [problem]
    rows = [*_gpu_rows(facts), _answer_row(facts), _version_row(facts)]
    if facts.pytorch.state == "works" and facts.pytorch.cuda:
        rows.extend(_kernel_rows(facts))
    return [row for row in rows if row is not None]


def _gpu_rows(facts: Facts) -> list[Row]:
    """GPUs of the same kind in one row; those whose memory others hold in a row each."""
    kinds = Counter(_named(gpu) for gpu in facts.gpus)
    rows = [ok(SECTION, "GPU", f"{count} x {name}" if count > 1 else name) for name, count in kinds.items()]
    rows = rows or [ok(SECTION, "GPU", "NVML does not name the GPUs")]
    shown, there = facts.pytorch.count, len(facts.driver.gpus)
    if "CUDA_VISIBLE_DEVICES" in facts.variables and 0 < shown < there:
        value = facts.variables["CUDA_VISIBLE_DEVICES"]
        rows.append(ok(SECTION, "GPU", f"CUDA_VISIBLE_DEVICES={value} shows {shown} of {there}"))
    for index, gpu in enumerate(facts.driver.gpus):
        if gpu.memory_free is not None and gpu.memory_total and gpu.memory_free < gpu.memory_total / 5:
            total = gpu.memory_total / 2**30
            text = (
                f"others hold {total - gpu.memory_free / 2**30:.0f} of {total:.0f} GiB of GPU {index}: training "
                "may not fit"
            )
            rows.append(warning(SECTION, "GPU memory", text, f"nvidia-smi -i {index} names the programs that hold it"))
    return rows


def _named(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.capability:
        parts.append(f"compute capability {gpu.capability} ({architecture(gpu.capability)})")
    if gpu.memory_total:
        parts.append(f"{gpu.memory_total / 2**30:.0f} GiB")
    return ", ".join(parts)


def _answer_row(facts: Facts) -> Row | None:
    """A driver that works, though the look at it did not finish."""
    problem = facts.driver.problem
    if problem is None:
        return None
    if "no answer" in problem:
        return warning(
            SECTION,
            "driver",
            f"the driver answers slowly: {problem}. Without persistence mode every program sets all GPUs up anew",
            "update NVIDIA's driver in Windows"
            if facts.machine.wsl
            else (
                "on the host: sudo nvidia-persistenced --persistence-mode, or sudo systemctl enable --now "
                "nvidia-persistenced"
            ),
        )
    return warning(
        SECTION,
        "driver",
        f"CUDA starts, but the look at the driver did not finish: {problem}",
        "try nvidia-smi; where that fails as well, reboot the host",
    )


def _version_row(facts: Facts) -> Row | None:
    """What the driver supports against what this PyTorch was built for."""
    driver, built = facts.driver, facts.pytorch.cuda
    version = driver.version or facts.hardware.kernel_module
    what = f"driver {version}" if version else "a driver that does not tell its version"
    what += f", supports CUDA {driver.cuda}" if driver.cuda else ""
    if facts.pytorch.state != "works" or built is None:
        return ok(SECTION, "driver", what)
    what += f"; this PyTorch was built for CUDA {built}"
    toolkit = toolkit_drivers(built)
    if driver.cuda and number(driver.cuda) >= number(built):  # also with CUDA's forward-compatibility libraries
        newer_major = number(driver.cuda)[0] > number(built)[0]
        if not (version and toolkit) or newer_major or number(version) >= number(toolkit[0]):
            return ok(SECTION, "driver", what)
        if number(version) < number(toolkit[1]):
            return ok(SECTION, "driver", what + ", by CUDA's forward-compatibility libraries")
    least = least_driver(built)
    too_old = (version and least and number(version) < number(least)) or (
        driver.cuda and number(driver.cuda)[0] < number(built)[0]
    )
    if too_old:
        wanted = toolkit[0] if toolkit else least
        update = newer_driver(facts, wanted, built)
        update += f" (at least {least})" if least != wanted and not facts.machine.wsl else ""
        capability = facts.gpus[0].capability if facts.gpus else None
        other = another_pytorch(facts, capability, which="that this driver runs")
        return broken(
            SECTION,
            "driver",
            f"{what}, which needs driver {least or 'of CUDA ' + built} or newer",
            update + (f"; or {other}" if other else ""),
            Cause.DRIVER_TOO_OLD,
        )
    below = (version and toolkit and number(version) < number(toolkit[0])) or (
        driver.cuda and number(driver.cuda) < number(built)
    )
    if below:
        update = newer_driver(facts, toolkit[0] if toolkit else None, built)
        return warning(
            SECTION,
            "driver",
            f"{what}. Ready-made kernels run (minor-version compatibility), but kernels that are compiled here, as by "
            "Triton and torch.compile, may fail",
            f"{update}; if the operator fails below: export DDETR_OPS=reference",
        )
    return ok(SECTION, "driver", what)


def served(facts: Facts) -> list[int]:
    """Those of PyTorch's GPUs, by its indices, that it has kernels for, or of which that is not known."""
    built = facts.pytorch.architectures
    if not facts.pytorch.gpus or not built:
        return list(range(facts.pytorch.count))
    return _served(facts.pytorch.gpus, built)


def _served(gpus: list[Gpu], built: list[str]) -> list[int]:
    return [i for i, gpu in enumerate(gpus) if gpu.capability is None or runs_on(built, gpu.capability)]


def _kernel_rows(facts: Facts) -> list[Row]:
    """The architecture of every kind of GPU against the kernels in this PyTorch."""
    built = facts.pytorch.architectures
    capabilities = sorted({gpu.capability for gpu in facts.gpus if gpu.capability}, key=capability_number)
    if not built or not capabilities:
        return []
    others = _served(facts.gpus, built)
    return [_kernel_row(facts, capability, built, others) for capability in capabilities]


def _only(facts: Facts, indices: list[int]) -> str:
    """The variables that leave only these GPUs, by their indices in `facts.gpus`."""
    names = [str(index) for index in indices]
    if not facts.pytorch.gpus:  # the driver's order is not CUDA's
        return f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={','.join(names)}"
    shown = [name.strip() for name in facts.variables.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if len(shown) >= len(facts.pytorch.gpus) and all(shown):  # then PyTorch counts within these
        names = [shown[index] for index in indices]
    return f"CUDA_VISIBLE_DEVICES={','.join(names)}"


def _kernel_row(facts: Facts, capability: str, built: list[str], others: list[int]) -> Row:
    """
    Args:
        facts: all that is known.
        capability: of the GPUs that the row is about.
        built: architectures that this PyTorch has kernels for.
        others: indices of the GPUs that are served.
    """
    arch, has = architecture(capability), f"this PyTorch has kernels for {range_of(built)}"
    how = runs_on(built, capability)
    another = another_pytorch(facts, capability, which="with kernels for it")
    if how == "kernels":
        return ok(SECTION, "kernels", f"{has}: {arch} is served")
    if how == "PTX":
        return warning(
            SECTION,
            "kernels",
            f"{has}, none of them for {arch}: the driver compiles them at first use, which takes minutes",
            f"leave the cache where it is (~/.nv), or {another or newer_pytorch(facts)}",
        )
    lowest, highest = limits_of(built)
    names = ", ".join(sorted({gpu.name for gpu in facts.gpus if gpu.capability == capability}))
    too_new = capability_number(capability) > highest
    gap = "is older than" if capability_number(capability) < lowest else "is left out of"
    gap = "is newer than" if too_new else gap
    text = f"{names} ({arch}) {gap} this PyTorch, which has kernels for {range_of(built)}"
    if too_new:
        text += ": the first computation would fail with 'no kernel image is available'"
    if others:
        to_do = f"leave it out: export {_only(facts, others)}"
        return warning(SECTION, "kernels", text, f"{to_do}; or {another}" if another else to_do)
    if too_new:
        return broken(SECTION, "kernels", text, another or newer_pytorch(facts), Cause.GPU_TOO_NEW)
    neither = "no PyTorch that ddetr runs with has kernels for it: use the CPU (ddetr doctor --cpu) or a newer GPU"
    return broken(SECTION, "kernels", text, another or neither, Cause.GPU_TOO_OLD)
