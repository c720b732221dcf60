"""From the facts to rows: the GPUs, the driver, and whether this PyTorch fits both."""

from collections import Counter

from ddetr.doctor.causes import Cause
from ddetr.doctor.facts import Facts, Gpu
from ddetr.doctor.rows import Row, broken, ok, warning
from ddetr.doctor.versions import (
    architecture,
    capability_number,
    install_command,
    least_driver,
    limits_of,
    number,
    range_of,
    runs_on,
    toolkit_drivers,
)

SECTION = "GPU and driver"
_START_WITH_GPUS = {
    "docker": "docker run --gpus all ... (compose: the GPU reservation in compose.yaml)",
    "podman": "podman run --device nvidia.com/gpu=all ...",
    "kubernetes": "put nvidia.com/gpu: 1 into resources.limits of the container",
}
_TOOLKIT = (
    "if that is refused, install the NVIDIA Container Toolkit on the host: sudo apt install nvidia-container-toolkit && "
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)
_INSTALL_DRIVER = "Ubuntu: sudo ubuntu-drivers install; Debian: sudo apt install nvidia-driver; then reboot"
_NVML_NOT_LOADED, _NVML_MISMATCH = 9, 18
_CUDA_NO_DEVICE, _CUDA_MISMATCH = 100, 803
# CUresult of cuInit: what it means, what helps.
_CU_INIT = {
    34: (
        "libcuda.so.1 is the stub that the CUDA toolkit has for building, not the driver's library",
        "take .../lib64/stubs out of LD_LIBRARY_PATH",
    ),
    46: ("the GPU is in use by a process that has it for itself", "nvidia-smi -c DEFAULT ends the exclusive mode"),
    802: (
        "the GPUs of this machine are joined by NVSwitch, and the service that sets it up does not run",
        "on the host: sudo systemctl enable --now nvidia-fabricmanager (its version must be the driver's)",
    ),
    804: (
        "CUDA's forward-compatibility libraries are in use, which work on data-centre GPUs only",
        "take the compat folder out of LD_LIBRARY_PATH (sudo apt remove 'cuda-compat-*'), or update the driver",
    ),
    999: (
        "the driver answers with 'unknown error', as after a suspend or without its module nvidia_uvm",
        "on the host: sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm; if that does not help, reboot",
    ),
}


def check_driver(facts: Facts) -> list[Row]:
    """Section 2. Without a usable GPU one row says why, with the most fundamental reason."""
    if facts.cpu:
        return [ok(SECTION, "GPU", "not looked at: --cpu says that none is expected")]
    if problem := _why_unusable(facts):
        return [problem]
    rows = [*_gpu_rows(facts), _version_row(facts)]
    if facts.pytorch.state == "works" and facts.pytorch.cuda:
        rows.extend(_kernel_rows(facts))
    return [row for row in rows if row is not None]


def _why_unusable(facts: Facts) -> Row | None:
    driver, hardware, machine = facts.driver, facts.hardware, facts.machine
    if driver.nvml == _NVML_MISMATCH or driver.cu_init == _CUDA_MISMATCH:
        module = f" (the kernel runs {hardware.kernel_module})" if hardware.kernel_module else ""
        return broken(
            SECTION,
            "driver",
            f"Driver/library version mismatch: the driver was updated, and the old one still runs in the kernel{module}",
            "reboot the host"
            + ("; then start this container anew" if machine.container else "")
            + ". Without a reboot, when no program uses the GPU: sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia",
            Cause.DRIVER_MISMATCH,
        )
    if driver.problem:
        return broken(
            SECTION,
            "driver",
            f"the driver's libraries do not answer as they should: {driver.problem}",
            "try nvidia-smi; where that fails as well, reboot the host and install the driver anew",
            Cause.CUDA_FAILS,
        )
    if _usable(facts):
        return None
    if machine.container and not hardware.devices and hardware.seen:
        return _container_without_gpus(facts)
    if not hardware.seen and not driver.libcuda and not driver.gpus:
        return _no_gpu(facts)
    if not driver.libcuda:
        return _no_libcuda(facts)
    if driver.cu_init == _CUDA_NO_DEVICE and "CUDA_VISIBLE_DEVICES" in facts.variables:
        return broken(
            SECTION,
            "GPU",
            f"CUDA_VISIBLE_DEVICES={facts.variables['CUDA_VISIBLE_DEVICES']!r} hides every GPU",
            "unset CUDA_VISIBLE_DEVICES, or set it to numbers from nvidia-smi -L, such as CUDA_VISIBLE_DEVICES=0",
            Cause.GPUS_HIDDEN,
        )
    if driver.nvml == _NVML_NOT_LOADED or driver.cu_init == _CUDA_NO_DEVICE:
        return _not_loaded(facts)
    text, to_do = _CU_INIT.get(
        driver.cu_init or 0,
        (
            f"the driver does not start: cuInit returns {driver.cu_init}, NVML says {driver.nvml_error or 'nothing'}",
            "try nvidia-smi; look at the kernel's messages: sudo dmesg | grep -i nvrm; reboot",
        ),
    )
    return broken(SECTION, "driver", text, to_do, Cause.CUDA_FAILS)


def _usable(facts: Facts) -> bool:
    return facts.driver.cu_init == 0 or facts.pytorch.available


def _container_without_gpus(facts: Facts) -> Row:
    hardware, kind = facts.hardware, facts.machine.container
    what = f"{hardware.gpus_on_pci} NVIDIA GPU(s)" if hardware.gpus_on_pci else "NVIDIA's driver"
    void = facts.variables.get("NVIDIA_VISIBLE_DEVICES")
    to_do = f"start it with them: {_START_WITH_GPUS.get(kind, _START_WITH_GPUS['docker'])}"
    if void in ("void", "none", ""):
        to_do = f"NVIDIA_VISIBLE_DEVICES={void} leaves the GPUs out: take it away; " + to_do
    return broken(
        SECTION,
        "GPU",
        f"this machine has {what}, but the container was started without: there is no /dev/nvidia0 in here",
        f"{to_do}; {_TOOLKIT}" if kind != "kubernetes" else to_do + ", on a node with NVIDIA's device plugin",
        Cause.CONTAINER_WITHOUT_GPUS,
    )


def _no_gpu(facts: Facts) -> Row:
    looked = "on the PCI bus, no driver, no /dev/nvidia*"
    if facts.hardware.gpus_on_pci is None:
        looked = "to be seen (no PCI bus here), no driver, no /dev/nvidia*"
    to_do = "nothing, if none is expected: everything runs on the CPU, slowly, and ddetr doctor --cpu checks just that"
    if facts.machine.container:
        command = _START_WITH_GPUS.get(facts.machine.container, _START_WITH_GPUS["docker"])
        to_do += f". If the host has one, start with it: {command}"
    return broken(SECTION, "GPU", f"no NVIDIA GPU {looked}", to_do, Cause.NO_GPU)


def _no_libcuda(facts: Facts) -> Row:
    if facts.machine.container:
        asked = facts.variables.get("NVIDIA_DRIVER_CAPABILITIES")
        wrong = asked is not None and not {"compute", "all"} & set(asked.split(","))
        return broken(
            SECTION,
            "driver",
            "the GPU's devices are in this container, but the driver's libraries are not (no libcuda.so.1)",
            f"NVIDIA_DRIVER_CAPABILITIES={asked} lacks compute: set it to compute,utility"
            if wrong
            else "pass the GPUs by the NVIDIA Container Toolkit (docker run --gpus all), not by --device /dev/nvidia0",
            Cause.NO_DRIVER,
        )
    held = [name for name in facts.hardware.pci_drivers if name != "nvidia"]
    count = facts.hardware.gpus_on_pci
    what = f"{count} NVIDIA GPU(s) on the PCI bus" if count else "an NVIDIA GPU"
    return broken(
        SECTION,
        "driver",
        f"{what}, but NVIDIA's driver is not installed (no libcuda.so.1)"
        + (f"; the kernel driver {held[0]} holds the GPU" if held else ""),
        _INSTALL_DRIVER,
        Cause.NO_DRIVER,
    )


def _not_loaded(facts: Facts) -> Row:
    if facts.machine.container and not facts.hardware.devices:
        return _container_without_gpus(facts)
    if not facts.hardware.seen:
        return broken(
            SECTION,
            "GPU",
            "NVIDIA's libraries are installed, but there is no NVIDIA GPU on this machine",
            "choose a machine with a GPU, or check for work on the CPU: ddetr doctor --cpu",
            Cause.NO_GPU,
        )
    return broken(
        SECTION,
        "driver",
        "NVIDIA's libraries are installed, but its kernel module is not at work: it was not built for this kernel, or "
        "Secure Boot refuses it",
        "sudo modprobe nvidia says why; for a new kernel: sudo dkms autoinstall; for Secure Boot: enrol the key (mokutil)",
        Cause.NO_DRIVER,
    )


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
            text = f"others hold {total - gpu.memory_free / 2**30:.0f} of {total:.0f} GiB of GPU {index}: training may not fit"
            rows.append(warning(SECTION, "GPU memory", text, f"nvidia-smi -i {index} names the programs that hold it"))
    return rows


def _named(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.capability:
        parts.append(f"compute capability {gpu.capability} ({architecture(gpu.capability)})")
    if gpu.memory_total:
        parts.append(f"{gpu.memory_total / 2**30:.0f} GiB")
    return ", ".join(parts)


def _version_row(facts: Facts) -> Row | None:
    """What the driver supports against what this PyTorch was built for."""
    driver, built = facts.driver, facts.pytorch.cuda
    version = driver.version or facts.hardware.kernel_module
    what = f"driver {version}" if version else "a driver that does not tell its version"
    what += f", supports CUDA {driver.cuda}" if driver.cuda else ""
    if facts.pytorch.state != "works" or built is None:
        return ok(SECTION, "driver", what)
    what += f"; this PyTorch was built for CUDA {built}"
    if driver.cuda and number(driver.cuda) >= number(built):  # also with CUDA's forward-compatibility libraries
        toolkit = toolkit_drivers(built)
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
        toolkit = toolkit_drivers(built)
        update = f"update the driver on the host to {toolkit[0] if toolkit else least} or newer"
        update += f" (at least {least})" if least else ""
        other = install_command(facts.gpus[0].capability if facts.gpus else None, version)
        return broken(
            SECTION,
            "driver",
            f"{what}, which needs driver {least or 'of CUDA ' + built} or newer",
            update + (f"; or install a PyTorch that this driver runs: {other}" if other else ""),
            Cause.DRIVER_TOO_OLD,
        )
    toolkit = toolkit_drivers(built)
    below = (version and toolkit and number(version) < number(toolkit[0])) or (
        driver.cuda and number(driver.cuda) < number(built)
    )
    if below:
        wanted = toolkit[0] if toolkit else f"of CUDA {built}"
        return warning(
            SECTION,
            "driver",
            f"{what}. Ready-made kernels run (minor-version compatibility), but kernels that are compiled here, as by Triton "
            "and torch.compile, may fail",
            f"update the driver on the host to {wanted} or newer; if the operator fails below: export DDETR_OPS=reference",
        )
    return ok(SECTION, "driver", what)


def _kernel_rows(facts: Facts) -> list[Row]:
    """The architecture of every kind of GPU against the kernels in this PyTorch."""
    built = facts.pytorch.architectures
    capabilities = sorted({gpu.capability for gpu in facts.gpus if gpu.capability}, key=capability_number)
    if not built or not capabilities:
        return []
    return [_kernel_row(facts, capability, built) for capability in capabilities]


def _kernel_row(facts: Facts, capability: str, built: list[str]) -> Row:
    arch, has = architecture(capability), f"this PyTorch has kernels for {range_of(built)}"
    how = runs_on(built, capability)
    if how == "kernels":
        return ok(SECTION, "kernels", f"{has}: {arch} is served")
    if how == "PTX":
        return warning(
            SECTION,
            "kernels",
            f"{has}, none of them for {arch}: the driver compiles them at first use, which takes minutes",
            "leave the cache where it is (~/.nv), or install a newer PyTorch: "
            + (install_command(capability, facts.driver.version) or "pip install --upgrade torch torchvision"),
        )
    lowest, highest = limits_of(built)
    names = ", ".join(sorted({gpu.name for gpu in facts.gpus if gpu.capability == capability}))
    command = install_command(capability, facts.driver.version)
    if capability_number(capability) > highest:
        return broken(
            SECTION,
            "kernels",
            f"{names} ({arch}) is newer than this PyTorch, which has kernels for {range_of(built)}: the first computation "
            "would fail with 'no kernel image is available'",
            f"install a PyTorch with kernels for it: {command or 'pip install --upgrade torch torchvision'}",
            Cause.GPU_TOO_NEW,
        )
    gap = "is older than" if capability_number(capability) < lowest else "is left out of"
    return broken(
        SECTION,
        "kernels",
        f"{names} ({arch}) {gap} this PyTorch, which has kernels for {range_of(built)}",
        f"install a PyTorch with kernels for it: {command}"
        if command
        else "no PyTorch that ddetr runs with has kernels for it: use the CPU (ddetr doctor --cpu) or a newer GPU",
        Cause.GPU_TOO_OLD,
    )
