"""What is really computed on a device, against the CPU in float64. Runs in a child: a kernel that crashes, hangs or
poisons its process is then a finding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ddetr.doctor import children
from ddetr.doctor.facts import Step
from ddetr.doctor.pytorch import wrong_nms

GPU_STEPS = ("allocation", "matrix product", "convolution", "operator", "nms")
CPU_STEPS = ("operator",)
_MIB = 2**20
# Relative to the largest value: rounding of the inputs and of 512 products is 2 to 4 times smaller. A wrong kernel is
# off by about 1.
_TOLERANCES = {"float32": 1e-5, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}


def try_devices(gpus: Sequence[int], *, timeout: float = 300) -> list[Step]:
    """Every step on every one of these GPUs and the exchange between them; on the CPU where there are none.

    Args:
        gpus: PyTorch's indices.
        timeout: seconds for each device.
    """
    devices = [f"cuda:{index}" for index in gpus] or ["cpu"]
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            found = list(pool.map(lambda device: try_device(device, timeout=timeout), devices))
        except BaseException:
            children.stop_all()
            raise
    steps = [step for steps in found for step in steps]
    if len(gpus) > 1:
        steps += [try_all_reduce(devices, timeout=timeout)]
    return steps


def try_device(device: str, *, timeout: float = 300, module: str = __name__) -> list[Step]:
    """All steps on a device. A step in which the child dies failed; those after it were not tried."""
    outcome = children.run(
        module, [device], timeout=timeout, variables={"DDETR_OPS_SELF_TEST": "always", "CUDA_LAUNCH_BLOCKING": "1"}
    )
    steps = [Step(**event) for event in outcome.events if "passed" in event]
    if outcome.problem:
        begun = [event["begins"] for event in outcome.events if "begins" in event]
        steps.append(
            Step(device=device, name=begun[-1] if begun else "allocation", passed=False, detail=outcome.problem)
        )
    return steps


def try_all_reduce(devices: Sequence[str], *, backend: str = "nccl", timeout: float = 300) -> Step:
    """The sum over a process for each device, such as "cuda:0" or "cpu"."""
    outcome = children.run("ddetr.doctor.all_reduce", [backend, *devices], timeout=timeout)
    found = next((event for event in outcome.events if "passed" in event), None)
    if found is not None and outcome.problem is None:
        return Step(**found)
    told = next((event["failed"] for event in outcome.events if "failed" in event), None)
    return Step(
        device=", ".join(devices), name="all-reduce", passed=False, detail=told or outcome.problem or "no result"
    )


def main(arguments: Sequence[str]) -> None:
    (name,) = arguments
    children.tell(begins="allocation" if name != "cpu" else "operator")
    import torch

    device = torch.device(name)
    tried: dict[str, Callable[[Any], str]] = {
        "allocation": _allocation,
        "matrix product": _matrix_products,
        "convolution": _convolution,
        "operator": _operator,
        "nms": _nms,
    }
    for step in GPU_STEPS if device.type == "cuda" else CPU_STEPS:
        children.tell(begins=step)
        try:
            detail = tried[step](device)
        except Exception as error:
            children.tell(device=name, name=step, passed=False, detail=children.sentence(error))
            if device.type == "cuda" and not isinstance(error, _WrongError):
                return  # after an error of CUDA, every later call in this process fails as well
        else:
            children.tell(device=name, name=step, passed=True, detail=detail)


class _WrongError(Exception):
    """The device computed something, and it is wrong; it may go on."""


def _off(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest value."""
    return ((got.double().cpu() - want.double()).abs().max() / want.abs().max()).item()


def _allocation(device: Any) -> str:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    size = min(256 * _MIB, free // 4)
    data = torch.arange(size // 8, dtype=torch.int64, device=device)
    if int(data[-1]) != size // 8 - 1 or int(data.sum()) != (size // 8) * (size // 8 - 1) // 2:
        raise _WrongError(f"{size // _MIB} MiB came back different from what was written")
    return f"{size // _MIB} MiB"


def _matrix_products(device: Any) -> str:
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    want = a @ b
    notes = []
    major = torch.cuda.get_device_capability(device)[0]
    for precision, tolerance in _TOLERANCES.items():
        if major < 8 and precision in ("tf32", "bfloat16"):  # from Ampere on; before, bfloat16 is emulated or absent
            continue
        dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        off = _off(a.to(device, dtype) @ b.to(device, dtype), want)
        if not off < tolerance:
            raise _WrongError(f"the product in {precision} is off by {off:.1e} of the largest value")
        notes.append(f"{precision} {off:.0e}")
    torch.backends.cuda.matmul.allow_tf32 = False
    return ", ".join(notes)


def _convolution(device: Any) -> str:
    import torch

    torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 16, 40, 56, generator=generator, dtype=torch.float64)
    kernel = torch.randn(32, 16, 3, 3, generator=generator, dtype=torch.float64)

    def run(place: Any, dtype: Any) -> tuple[Any, ...]:
        leaves = [tensor.to(place, dtype).requires_grad_() for tensor in (image, kernel)]
        output = torch.nn.functional.conv2d(*leaves, stride=2, padding=1)
        return output.detach(), *torch.autograd.grad(output.square().sum(), leaves)

    for what, got, want in zip(
        ("output", "gradient", "gradient"), run(device, torch.float32), run("cpu", torch.float64)
    ):
        if not (off := _off(got, want)) < 1e-4:
            raise _WrongError(f"the {what} of a convolution is off by {off:.1e} of the largest value")
    return "cuDNN, forward and backward"


def _nms(device: Any) -> str:
    if wrong := wrong_nms(device):
        raise _WrongError(f"torchvision::nms {wrong}")
    return "torchvision::nms"


def _operator(device: Any) -> str:
    """The operator as training calls it, forward and backward, against the reference on the CPU in float64. A back end
    that was rejected by its own self-test, and replaced, counts as wrong."""
    import torch

    from ddetr.ops import backends, ms_deform_attn_step
    from ddetr.ops.reference import attention_step_reference

    shapes = [(12, 17), (6, 9), (3, 5), (2, 3)]
    n, m, d, q, num_points = 2, 8, 32, 50, 4
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    value = normal(n, sum(h * w for h, w in shapes), m, d)
    offsets = 2 * normal(n, q, m, len(shapes), num_points, 2)
    logits = normal(n, q, m, len(shapes), num_points)
    for reference in (normal(n, q, len(shapes), 2).sigmoid(), normal(n, q, len(shapes), 4).sigmoid()):
        inputs = (value, offsets, logits, reference)
        weights = normal(n, q, m * d)

        def run(
            step: Callable, place: Any, dtype: Any, inputs: Any = inputs, weights: Any = weights
        ) -> tuple[Any, ...]:
            leaves = [tensor.to(place, dtype).requires_grad_() for tensor in inputs]
            output = step(leaves[0], shapes, *leaves[1:])
            return output.detach(), *torch.autograd.grad((output * weights.to(place, dtype)).sum(), leaves)

        with _warnings() as said:
            got = run(ms_deform_attn_step, device, torch.float32)
        if said:
            raise _WrongError(said[0])
        names = ("output", "gradient of value", "gradient of offsets", "gradient of logits", "gradient of references")
        for name, computed, expected in zip(names, got, run(attention_step_reference, "cpu", torch.float64)):
            if not (off := _off(computed, expected)) < 1e-3:
                raise _WrongError(f"the {name} is off by {off:.1e} of the largest value")
    active = next((row for row in backends() if row.active and row.device == device.type), None)
    return f"{active.name}, {active.detail}" if active else "plain PyTorch"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What ddetr.ops warns of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ddetr.ops")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)
