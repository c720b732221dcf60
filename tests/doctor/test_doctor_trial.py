"""What is computed on a device: it passes where all is well, and finds an operator that is wrong."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddetr.doctor import trial


def test_the_operator_on_the_cpu() -> None:
    (step,) = trial.try_devices([])
    assert (step.device, step.name, step.passed) == ("cpu", "operator", True), step
    assert step.detail


@pytest.mark.parametrize("output", [0, 1, 2, 3, 4])
def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch, output: int) -> None:
    """Wrong by a hundredth, in the output or in one of the gradients."""
    import ddetr.ops
    from ddetr.ops.reference import attention_step_reference

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, shapes: Any, *inputs: torch.Tensor) -> torch.Tensor:
            ctx.shapes = shapes
            ctx.save_for_backward(*inputs)
            value, *rest = inputs
            return attention_step_reference(value, shapes, *rest) * (1.01 if output == 0 else 1)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                result = attention_step_reference(leaves[0], ctx.shapes, *leaves[1:])
            grads = list(torch.autograd.grad(result, leaves, grad))
            if output:
                grads[output - 1] = grads[output - 1] * 1.01
            return None, *grads

    def step(value: torch.Tensor, shapes: Any, *rest: torch.Tensor) -> torch.Tensor:
        return Wrong.apply(shapes, value, *rest)

    monkeypatch.setattr(ddetr.ops, "ms_deform_attn_step", step)
    names = ["output", "gradient of value", "gradient of offsets", "gradient of logits", "gradient of references"]
    with pytest.raises(trial._WrongError, match=f"the {names[output]} is off by"):
        trial._operator(torch.device("cpu"))


def test_a_back_end_that_was_replaced_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import ddetr.ops

    right = ddetr.ops.ms_deform_attn_step

    def step(*arguments: Any) -> torch.Tensor:
        logging.getLogger("ddetr.ops.backends").warning("the triton back end failed its self-test")
        return right(*arguments)

    monkeypatch.setattr(ddetr.ops, "ms_deform_attn_step", step)
    with pytest.raises(trial._WrongError, match="the triton back end failed its self-test"):
        trial._operator(torch.device("cpu"))


def test_an_operator_that_cannot_be_chosen_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_OPS", "nonsense")
    (step,) = trial.try_devices([])
    assert not step.passed
    assert "DDETR_OPS=nonsense is not a back end" in step.detail


def test_matrix_products_and_convolutions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the GPU's steps, run on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cpu = torch.device("cpu")
    precisions = [part.split()[0] for part in trial._matrix_products(cpu).split(", ")]
    assert precisions == ["float32", "tf32", "bfloat16", "float16"]
    assert "forward and backward" in trial._convolution(cpu)
    assert trial._nms(cpu) == "torchvision::nms"

    right = torch.nn.functional.conv2d

    def wrong(image: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return right(image, *rest, **options) * (1.001 if image.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.nn.functional, "conv2d", wrong)
    with pytest.raises(trial._WrongError, match="the output of a convolution is off by"):
        trial._convolution(cpu)
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: multiply(a, b) * (1.1 if a.dtype == torch.bfloat16 else 1)
    )
    with pytest.raises(trial._WrongError, match="the product in bfloat16 is off by"):
        trial._matrix_products(cpu)


def test_memory_is_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (32 * 2**20, 64 * 2**20))
    assert trial._allocation(torch.device("cpu")) == "8 MiB"
    real = torch.arange

    def faulty(*arguments: Any, **options: Any) -> torch.Tensor:
        data = real(*arguments, **options)
        data[1000] ^= 4
        return data

    monkeypatch.setattr(torch, "arange", faulty)
    with pytest.raises(trial._WrongError, match="8 MiB came back different"):
        trial._allocation(torch.device("cpu"))


def test_processes_that_add_up() -> None:
    step = trial.try_all_reduce(["cpu", "cpu"], backend="gloo")
    assert (step.name, step.passed, step.detail) == ("all-reduce", True, "gloo, 2 processes")


def test_processes_that_cannot_meet() -> None:
    """NCCL without GPUs."""
    if torch.cuda.is_available():
        pytest.skip("here it could")
    step = trial.try_all_reduce(["cuda:0", "cuda:1"], backend="nccl", timeout=120)
    assert not step.passed
    assert step.detail
    assert "Traceback" not in step.detail


def test_several_gpus_are_tried_and_then_their_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "try_device", lambda device, timeout: [SimpleNamespace(device=device, timeout=timeout)])
    monkeypatch.setattr(trial, "try_all_reduce", lambda devices, timeout: SimpleNamespace(device=devices))
    assert [step.device for step in trial.try_devices([0, 2])] == ["cuda:0", "cuda:2", ["cuda:0", "cuda:2"]]


@pytest.mark.parametrize(("error", "tried"), [(RuntimeError("CUDA error: illegal"), 2), (trial._WrongError("off"), 5)])
def test_after_an_error_of_cuda_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tried: int
) -> None:
    def fail(device: torch.device) -> str:
        raise error

    for name in ("_allocation", "_convolution", "_operator", "_nms"):
        monkeypatch.setattr(trial, name, lambda device: "well")
    monkeypatch.setattr(trial, "_matrix_products", fail)
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.children, "tell", lambda **event: events.append(event))
    trial.main(["cuda:0"])
    steps = [event for event in events if "passed" in event]
    assert [step["name"] for step in steps] == list(trial.GPU_STEPS)[:tried]
    assert [step["name"] for step in steps if not step["passed"]] == ["matrix product"]


def test_an_interrupt_ends_the_children(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """It reaches the main thread, while others wait for them."""
    monkeypatch.syspath_prepend(str(request.path.parent))
    waiting = threading.Event()

    def try_device(device: str, timeout: float) -> list[Any]:
        if device == "cuda:0":
            while not trial.children._running:
                waiting.wait(0.05)
            raise KeyboardInterrupt
        return [trial.children.run("doctor_child", ["hang"], timeout=timeout)]

    monkeypatch.setattr(trial, "try_device", try_device)
    with pytest.raises(KeyboardInterrupt):
        trial.try_devices([0, 1], timeout=250)
    assert not trial.children._running


@pytest.mark.gpu
def test_every_step_on_real_gpus() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    steps = trial.try_devices(range(torch.cuda.device_count()))
    assert [step for step in steps if not step.passed] == []
    assert {step.name for step in steps} >= set(trial.GPU_STEPS)
