"""What the installed PyTorch says of itself. Runs in a child: an import can crash, and CUDA must not be touched
here."""

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ddetr.doctor import children
from ddetr.doctor.facts import Gpu, PyTorch


def look(timeout: float = 90) -> PyTorch:
    """PyTorch, as a child sees it. A part in which the child dies is left out by the next one, so that the rest is
    known."""
    found: dict[str, Any] = {"state": "fails"}
    died: dict[str, str] = {}
    while True:
        outcome = children.run(__name__, sorted(died), timeout=timeout)
        for event in outcome.events:
            found.update(event)
        part = found.pop("doing", None)
        if outcome.problem is None:
            break
        if part not in _PARTS or part in died:
            found.update(state="fails", error=outcome.problem)
            break
        died[part] = outcome.problem
    found.update({part: problem for part, problem in died.items() if part.endswith("_error")})
    return PyTorch(**found | {"gpus": [Gpu(**gpu) for gpu in found.get("gpus", [])]})


def main(arguments: Sequence[str]) -> None:
    children.tell(doing="torch")
    try:
        import torch
    except ModuleNotFoundError as error:
        children.tell(state="missing" if error.name == "torch" else "fails", error=children.sentence(error))
        return
    except BaseException as error:
        children.tell(state="fails", error=children.sentence(error))
        return
    children.tell(state="works", error=None, version=str(torch.__version__), cuda=torch.version.cuda)
    children.tell(hip=getattr(torch.version, "hip", None))
    # get_arch_list() is empty where there is no GPU; what it reads is not.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    children.tell(architectures=torch.cuda.get_arch_list() or flags.split())
    for part, what in _PARTS.items():
        if part not in arguments:
            _tell(part, what)
    children.tell(doing=None)


def _tell(part: str, what: Callable[[], dict[str, Any]]) -> None:
    """What `what` finds; the error that it ends with where that is a fact: under the part's name, if it is
    `..._error`."""
    children.tell(doing=part)
    try:
        children.tell(**what())
    except BaseException as error:
        if part.endswith("_error"):
            children.tell(**{part: children.sentence(error)})


def _gpus() -> dict[str, Any]:
    """The four questions that everybody asks first, and every GPU's properties."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        found: dict[str, Any] = {"available": available, "count": torch.cuda.device_count()}
    children.tell(**found)
    if caught:
        found["cuda_error"] = " ".join(str(caught[0].message).split())
    if not available:
        if torch.version.cuda and not caught:
            torch.cuda.init()  # says why not
        return found
    current = torch.cuda.current_device()
    children.tell(current=current, name=torch.cuda.get_device_name(current))
    all_properties = [torch.cuda.get_device_properties(index) for index in range(found["count"])]
    gpus = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_total": p.total_memory} for p in all_properties
    ]
    return {"gpus": gpus}


def _cudnn() -> dict[str, Any]:
    """92400 -> "9.24.0"; until cuDNN 8: 8902 -> "8.9.2"."""
    import torch

    version = torch.backends.cudnn.version()
    if not version:
        return {"cudnn": None}
    major, rest = divmod(version, 10000 if version >= 90000 else 1000)
    return {"cudnn": f"{major}.{rest // 100}.{rest % 100}"}


def _nccl() -> dict[str, Any]:
    import torch

    version = torch.cuda.nccl.version() if torch.version.cuda else None
    return {"nccl": ".".join(map(str, version)) if isinstance(version, tuple) else version}


def _triton() -> dict[str, Any]:
    return {"triton": importlib.metadata.version("triton")}


def _torchvision() -> dict[str, Any]:
    try:
        children.tell(torchvision=importlib.metadata.version("torchvision"))
        _tell("requirement", _requirement)
    except importlib.metadata.PackageNotFoundError:
        return {"torchvision_error": "it is not installed"}
    import torchvision

    return {"torchvision": str(torchvision.__version__)}


def _requirement() -> dict[str, Any]:
    """The torch that torchvision's package asks for, and whether it is the one that is here."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("torchvision") or [])
    needs = next(requirement.specifier for requirement in requirements if requirement.name == "torch")
    here = importlib.metadata.version("torch")
    return {"torchvision_needs": str(needs), "torchvision_fits": needs.contains(here, prereleases=True)}


def _nms() -> dict[str, Any]:
    wrong = wrong_nms("cpu")
    return {"nms_error": wrong and f"it {wrong}"}


def wrong_nms(device: Any) -> str | None:
    """What torchvision's non-maximum suppression did wrong on a device, in words; None where it is right."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]], device=device)
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5).tolist()
    return None if kept == [0, 2] else f"kept the boxes {kept} where 0 and 2 are right"


_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "cudnn_error": _cudnn,
    "nccl": _nccl,
    "triton": _triton,
    "torchvision_error": _torchvision,
    "nms_error": _nms,
    "cuda_error": _gpus,
}
