"""What the installed PyTorch says of itself. Runs in a child: an import can crash, and CUDA must not be touched here."""

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ddetr.doctor import children
from ddetr.doctor.facts import Gpu, PyTorch


def look(timeout: float = 120) -> PyTorch:
    """PyTorch, as a child sees it."""
    outcome = children.run(__name__, timeout=timeout)
    found: dict[str, Any] = {}
    for event in outcome.events:
        found.update(event)
    if outcome.problem:  # it died in whatever it announced last
        doing = found.get("doing")
        found.update({"state": "fails", "error": outcome.problem} if doing == "torch" else {})
        if doing in ("cuda_error", "torchvision_error", "nms_error", "cudnn_error"):
            found[doing] = outcome.problem
    found.pop("doing", None)
    gpus = [Gpu(**gpu) for gpu in found.pop("gpus", [])]
    return PyTorch(**({"state": "fails", "error": outcome.problem} | found), gpus=gpus)


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
    _tell("cuda_error", _gpus)
    _tell("cudnn_error", lambda: {"cudnn": _cudnn(torch.backends.cudnn.version())})
    _tell("doing_nccl", lambda: {"nccl": _dotted(torch.cuda.nccl.version()) if torch.version.cuda else None})
    _tell("doing_triton", lambda: {"triton": importlib.metadata.version("triton")})
    _tell("torchvision_error", _torchvision)
    _tell("nms_error", _nms)
    children.tell(doing=None)


def _tell(key: str, what: Callable[[], dict[str, Any]]) -> None:
    """What `what` finds; under `key` the error that it ends with, where that is a fact."""
    children.tell(doing=key)
    try:
        children.tell(**what())
    except BaseException as error:
        if not key.startswith("doing"):
            children.tell(**{key: children.sentence(error)})


def _gpus() -> dict[str, Any]:
    """The four questions that everybody asks first, and every GPU's properties."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        found: dict[str, Any] = {"available": available, "count": torch.cuda.device_count()}
    if caught:
        found["cuda_error"] = " ".join(str(caught[0].message).split())
    if not available:
        return found
    children.tell(**found)
    current = torch.cuda.current_device()
    children.tell(current=current, name=torch.cuda.get_device_name(current))
    all_properties = [torch.cuda.get_device_properties(index) for index in range(found["count"])]
    gpus = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_total": p.total_memory} for p in all_properties
    ]
    return {"gpus": gpus}


def _cudnn(version: int | None) -> str | None:
    """92400 -> "9.24.0"; until cuDNN 8: 8902 -> "8.9.2"."""
    if not version:
        return None
    major = version // 10000 if version >= 90000 else version // 1000
    rest = version - major * (10000 if version >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _dotted(version: Any) -> str:
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _torchvision() -> dict[str, Any]:
    try:
        children.tell(torchvision=importlib.metadata.version("torchvision"))
        _tell("doing_requirement", _requirement)
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
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    return {"nms_error": None if kept == [0, 2] else f"it kept the boxes {kept} where 0 and 2 are right"}
