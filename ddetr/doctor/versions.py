"""The published versions that machines are held against: versions.json, which the image, its locks and labels read
too."""

import functools
import json
import re
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("versions.json")


@functools.cache
def published() -> dict[str, Any]:
    return json.loads(_FILE.read_text("utf-8"))


def number(version: str) -> tuple[int, ...]:
    """ "550.54.15" -> (550, 54, 15); what follows the numbers is left out, so "2.6.0+cu124" -> (2, 6, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]


def toolkit_drivers(cuda: str) -> tuple[str, str] | None:
    """(driver of the toolkit, least driver of minor-version compatibility) of a CUDA version; None where not known."""
    drivers = published()["toolkits"]["drivers"]
    found = drivers.get(".".join(cuda.split(".")[:2]))
    return (found["driver"], found["driver_minimum"]) if found else None


def least_driver(cuda: str) -> str | None:
    """The least driver of a CUDA version, also of one that is newer than the table: it is that of the major version."""
    if found := toolkit_drivers(cuda):
        return found[1]
    major = cuda.split(".")[0]
    drivers = published()["toolkits"]["drivers"]
    return next((row["driver_minimum"] for name, row in drivers.items() if name.split(".")[0] == major), None)


def runs_on(architectures: list[str], capability: str) -> str | None:
    """How kernels of `architectures` run on a GPU: "kernels", "PTX" (compiled by the driver at first use), None (not).

    Binary kernels run on GPUs of the same major and the same or a higher minor version; sm_90a and the like only on
    exactly theirs. PTX (compute_80) runs on everything newer.
    """
    gpu = capability_number(capability)
    ptx = False
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not found:
            continue
        kernel = (int(found[2]), int(found[3]))
        exact = found[4] == "a"
        if found[1] == "sm" and (kernel == gpu if exact else kernel[0] == gpu[0] and kernel[1] <= gpu[1]):
            return "kernels"
        ptx = ptx or (found[1] == "compute" and (kernel == gpu if exact else kernel <= gpu))
    return "PTX" if ptx else None


def capability_number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def architecture(capability: str) -> str:
    """ "8.6" -> "sm_86"."""
    return "sm_" + capability.replace(".", "")


def limits_of(architectures: list[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the greatest capability that there are binary kernels for; (0, 0) twice where there are none."""
    found = [re.fullmatch(r"sm_(\d+)(\d)[af]?", name) for name in architectures]
    numbers = [(int(match[1]), int(match[2])) for match in found if match] or [(0, 0)]
    return min(numbers), max(numbers)


def range_of(architectures: list[str]) -> str:
    """ "sm_50 to sm_90"."""
    least, greatest = ("sm_{}{}".format(*limit) for limit in limits_of(architectures))
    return "no GPU" if greatest == "sm_00" else least if least == greatest else f"{least} to {greatest}"
