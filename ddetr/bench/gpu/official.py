"""The official CUDA operator, built from its source for the GPU that is here: `python -m ddetr.bench.gpu.official
SOURCE BUILT`.

Its source does not compile with PyTorch 2.6 and later in two places (`AT_DISPATCH_FLOATING_TYPES(value.type(), ...)`,
facts in its issue 251); a copy is built in which those two take the scalar type. The kernels are as they were.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

from ddetr.bench.gpu.sheet import Place, Sheet

MODULE = "MultiScaleDeformableAttention"
BUILDER = "ddetr.bench.gpu.official"
FAILED = "failed.txt"
_POLL_SECONDS = 0.5


def build(source: Path, built: Path) -> None:
    """Compile SOURCE/src into BUILT; where that fails, failed.txt there has the reason."""
    from torch.utils.cpp_extension import load

    copy = built / "src"
    shutil.copytree(source / "src", copy)
    for file in copy.rglob("*.cu"):
        text = file.read_text("utf-8")
        file.write_text(re.sub(r"(AT_DISPATCH_FLOATING_TYPES\(\s*\w+)\.type\(\)", r"\1.scalar_type()", text), "utf-8")
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    work = built / "work"
    work.mkdir()
    sources = [str(path) for pattern in ("*.cpp", "cpu/*.cpp", "cuda/*.cu") for path in sorted(copy.glob(pattern))]
    half = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
    try:
        load(
            MODULE,
            sources,
            extra_cflags=["-DWITH_CUDA"],
            extra_cuda_cflags=["-DWITH_CUDA", "-DCUDA_HAS_FP16=1", "-w", *half],
            extra_include_paths=[str(copy), *_cuda_headers()],
            build_directory=str(work),
            with_cuda=True,
            is_python_module=False,
        )
        # Under its name only when it is whole: the stage that waits for it sees all of it or nothing.
        library = next(work.glob(f"{MODULE}*.so"))
        os.replace(library, built / library.name)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "error:" in line] or [str(error)]
        (built / FAILED).write_text(lines[0][:300], "utf-8")
        raise


def _cuda_headers() -> list[str]:
    """Of CUDA's libraries, which PyTorch's wheels bring and a small toolkit lacks."""
    return [str(folder) for folder in Path(torch.__file__).parents[1].glob("nvidia/*/include")]


def wait_for(sheet: Sheet, place: Place, seconds: float) -> bool:
    """Whether the module can be imported, after so many seconds at most; its folder is then on the path."""
    if place.built is None:
        sheet.skip("official kernel", "give --official FOLDER, the models/ops of Deformable-DETR")
        return False
    folder, ends = Path(place.built), time.monotonic() + min(seconds, sheet.left())
    while not list(folder.glob(f"{MODULE}*.so")):
        if (folder / FAILED).exists():
            sheet.skip("official kernel", f"it does not build: {(folder / FAILED).read_text('utf-8')}")
            return False
        if time.monotonic() > ends:
            sheet.skip("official kernel", "its build has not come to an end in time: build it beforehand")
            return False
        time.sleep(_POLL_SECONDS)
    sys.path.insert(0, str(folder))
    return True


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
