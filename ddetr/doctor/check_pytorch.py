"""From the facts to rows: PyTorch, its own answer about CUDA, and the libraries that go with it."""

import sys

from ddetr.doctor.causes import Cause
from ddetr.doctor.cures import another_pytorch, first_pytorch, installing, newer_pytorch
from ddetr.doctor.facts import Facts
from ddetr.doctor.machine import DRIVER_FOLDER
from ddetr.doctor.rows import Row, broken, ok, warning
from ddetr.doctor.versions import number, published

ANSWER, SECTION = "PyTorch's own answer", "PyTorch"
_REINSTALL = "uv pip install --reinstall torch torchvision"


def check_answer(facts: Facts) -> list[Row]:
    """Section 1, the first check of every tutorial: is CUDA available? How many GPUs? Which is current? What is its
    name?

    Its rows are answers; what is broken behind a "no" is in the sections that look for the cause.
    """
    torch = facts.pytorch
    if torch.state != "works":
        return [ok(ANSWER, "CUDA available?", "nobody to ask: see PyTorch below")]
    if not torch.available:
        return [ok(ANSWER, "CUDA available?", "no; how many GPUs: 0; which is current: none; its name: none")]
    return [
        ok(ANSWER, "CUDA available?", "yes"),
        ok(ANSWER, "how many GPUs?", str(torch.count)),
        ok(ANSWER, "which is current?", str(torch.current)),
        ok(ANSWER, "its name?", str(torch.name)),
    ]


def check_pytorch(facts: Facts, *, driver_is_well: bool) -> list[Row]:
    """Section 3.

    Args:
        facts: all that is known.
        driver_is_well: nothing is broken in section 2, so that PyTorch has no excuse.
    """
    torch = facts.pytorch
    if torch.state == "missing":
        return [
            broken(
                SECTION,
                "PyTorch",
                f"not installed for {facts.machine.executable or sys.executable}",
                first_pytorch(facts),
                Cause.PYTORCH_MISSING,
            )
        ]
    if torch.state != "works":
        return [_import_fails(facts)]
    rows = [_build_row(facts)]
    if torch.cuda and not facts.cpu:
        if driver_is_well and not torch.available:
            rows.append(_no_cuda(facts))
        rows.extend(_library_rows(facts))
    return [*rows, _torchvision_row(facts)]


def _import_fails(facts: Facts) -> Row:
    error = facts.pytorch.error or "no reason given"
    path = facts.variables.get("LD_LIBRARY_PATH")
    anew = installing(facts, f"install it anew: {_REINSTALL}")
    if "GLIBC" in error:
        to_do = "this system's C library is older than PyTorch needs (glibc 2.28): use the image, or a newer system"
    elif path not in (None, "", DRIVER_FOLDER) and any(
        word in error for word in (".so", "undefined symbol", "OSError", "ImportError")
    ):
        to_do = f"LD_LIBRARY_PATH={path} may bring other libraries in: unset LD_LIBRARY_PATH and try again; else {anew}"
    elif "no answer" in error:
        to_do = (
            "the disk or the network file system may be slow: try again; python -X importtime -c 'import torch' "
            "shows where"
        )
    elif "killed" in error:
        to_do = "give the process more memory (docker run --memory, Kubernetes resources.limits.memory): 2 GiB at least"
    else:
        to_do = f"{anew}; the whole message: python -c 'import torch'"
    return broken(SECTION, "PyTorch", f"it cannot be imported. {error}", to_do, Cause.PYTORCH_IMPORT)


def _build_row(facts: Facts) -> Row:
    torch = facts.pytorch
    if torch.cuda:
        return ok(SECTION, "PyTorch", f"{torch.version}, built for CUDA {torch.cuda}")
    kind = f"for ROCm {torch.hip}" if torch.hip else "without CUDA (a CPU-only build)"
    has_gpu = bool(facts.driver.gpus or facts.driver.cu_init == 0 or facts.hardware.seen) and not facts.cpu
    if has_gpu and not (torch.hip and torch.available):
        to_do = "uv pip install --reinstall --torch-backend=auto torch torchvision"
        if facts.machine.container:
            capability = facts.gpus[0].capability if facts.gpus else None
            to_do = another_pytorch(facts, capability, which="with CUDA") or newer_pytorch(facts)
        return broken(
            SECTION,
            "PyTorch",
            f"{torch.version} was built {kind}: it cannot use the NVIDIA GPU of this machine",
            to_do,
            Cause.CPU_ONLY_BUILD,
        )
    return ok(SECTION, "PyTorch", f"{torch.version}, built {kind}")


def _no_cuda(facts: Facts) -> Row:
    said = facts.pytorch.cuda_error or "torch.cuda.is_available() is False, without a reason"
    variable = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        return broken(
            SECTION,
            "CUDA",
            f"the driver is well, but PyTorch sees no GPU, with CUDA_VISIBLE_DEVICES={variable!r}. {said}",
            "unset CUDA_VISIBLE_DEVICES, or set it to numbers from nvidia-smi -L, such as CUDA_VISIBLE_DEVICES=0",
            Cause.GPUS_HIDDEN,
        )
    return broken(
        SECTION,
        "CUDA",
        f"driver and PyTorch fit, but CUDA does not start: {said}",
        "python -c 'import torch; torch.cuda.init()' shows the whole error; a reboot of the host often helps; so does "
        "unset LD_LIBRARY_PATH where it names other CUDA libraries",
        Cause.CUDA_FAILS,
    )


def _library_rows(facts: Facts) -> list[Row]:
    torch = facts.pytorch
    if torch.cudnn_error or not torch.cudnn:
        cudnn = warning(
            SECTION,
            "cuDNN",
            f"it cannot be used: {torch.cudnn_error or 'this PyTorch has none'}",
            f"unset LD_LIBRARY_PATH where it names another cuDNN; else {installing(facts, _REINSTALL)}",
        )
    else:
        cudnn = ok(SECTION, "cuDNN", torch.cudnn)
    names = {"NCCL": torch.nccl, "Triton": torch.triton}
    rows = [cudnn] + [ok(SECTION, name, version) for name, version in names.items() if version]
    if not torch.triton:
        rows.append(
            warning(
                SECTION,
                "Triton",
                "not installed: the operator runs in plain PyTorch on the GPU, which is slower",
                installing(facts, f"uv pip install triton (on Linux PyTorch brings it: {_REINSTALL})"),
            )
        )
    elif torch.available and not facts.limits.c_compiler:
        rows.append(
            warning(
                SECTION,
                "C compiler",
                "none here, and Triton needs one at first use: the operator then runs in plain PyTorch, which is "
                "slower",
                installing(facts, "sudo apt install gcc python3-dev"),
            )
        )
    return rows


def _torchvision_row(facts: Facts) -> Row:
    torch = facts.pytorch
    version, here = torch.torchvision, torch.version or ""
    pair = published()["torchvision_pairs"]["pairs"].get(".".join(map(str, number(here)[:2])))
    paired = pair is None or version is None or number(version)[:2] == number(pair)
    fits = paired if torch.torchvision_fits is None else torch.torchvision_fits
    wanted = pair or "of the same release"
    command = f"uv pip install --reinstall torch=={here.partition('+')[0]} torchvision" + (
        f"=={pair}.*" if pair else ""
    )
    command = installing(facts, command)
    if version is None:
        return broken(
            SECTION, "torchvision", f"it cannot be used: {torch.torchvision_error}", command, Cause.TORCHVISION
        )
    error = torch.torchvision_error or torch.nms_error
    if not fits:
        needs = f" (it asks for torch{torch.torchvision_needs})" if torch.torchvision_needs else ""
        text = f"torchvision {version} does not go with PyTorch {here}{needs}: torchvision {wanted} does"
        return broken(SECTION, "torchvision", text + (f". {error}" if error else ""), command, Cause.TORCHVISION)
    if error:
        text = f"torchvision {version} is of the right version, but torchvision::nms does not work: {error}"
        return broken(SECTION, "torchvision", text, command, Cause.TORCHVISION)
    return ok(SECTION, "torchvision", f"{version}, matches; torchvision::nms works")
