"""Compiles kernels for GPUs that are not here: cases as JSON lines in, what became of them as JSON lines out.

A program of its own, since Triton must be imported without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddetr.bench.gpu import ideas
from ddetr.ops import triton_kernels

FLOAT32 = {"reference", "grad_value", "coarse", "grad_weights", "grad_reference"}
TYPED = {"value", "points", "weights", "output", "grad_output", "grad_points"}
KERNELS = {
    "forward": triton_kernels._forward_kernel,
    "backward": triton_kernels._backward_kernel,
    "packed": ideas.packed_forward_kernel,
    "split": ideas.packed_forward_kernel,
    "copies": ideas.copies_backward_kernel,
}
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compiled(kernel: str, target: int, dtype: str, d: int, reference: int, launch: list) -> dict[str, Any]:
    """Registers, bytes of stack (spills), and instructions that move 16 bytes."""
    function = KERNELS[kernel]
    launch = triton_kernels.Launch(*launch)
    constants = {"D": d, "P": 4, "REFERENCE": reference, "WITH_REFERENCE": reference > 0, "WIDE": False}
    constants |= {"SPLIT": kernel == "split", "FIRST": ideas.COARSE, "COPIES": 8, "PAIRS": launch.queries}
    constants |= {"QUERIES": launch.queries, "POINTS": launch.points, "CHANNELS": triton_kernels.channels_of(d)}
    constants |= {"STAGES": launch.stages, "EVICT": launch.evict}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(TYPED, f"*{dtype}") | {"levels": "*i32"}
    if kernel == "split":
        types["output"] = "*fp32"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in types}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": launch.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    ptx = result.asm["ptx"]
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + int(found[3]),
        "loads": len(re.findall(r"ld\.global[.:\w]*\.v4", ptx)),
        "copies": len(re.findall(r"cp\.async[.:\w]* .*, (?:0x10|16)\b", ptx)),
        "additions": len(re.findall(r"\.add[.\w]*\.v4\.f32", ptx)),
    }


for line in sys.stdin:
    case = json.loads(line)
    print(json.dumps(case | compiled(**case)), flush=True)
