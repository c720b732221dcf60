"""Memory of a step: the estimate against what PyTorch really keeps, limits of containers, and running out of it."""

import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.cli import main as cli
from ddetr.datasets import normalize_images
from ddetr.engine import memory
from ddetr.engine.memory import LiveBytes, MemoryEstimate, estimate_memory, explained_out_of_memory
from ddetr.errors import InputError
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.runtime.limits import free_and_total

CPU = torch.device("cpu")
SIZE, BATCH, OBJECTS = (96, 128), 2, 5
TOLERANCE = 0.03  # of the estimate against what is really kept by a detector as tiny as this; 0.002 by a full-size one


@pytest.fixture
def detector(tiny_model: dict[str, Any]) -> tuple[DeformableDETR, SetCriterion]:
    """Two-stage, with a pyramid whose activations are far larger than the weights."""
    torch.manual_seed(0)
    changes = {"two_stage": True, "dec_layers": 3, "enc_layers": 2, "num_feature_levels": 3, "num_classes": 3}
    model = DeformableDETR(**tiny_model | changes).train()
    return model, build_criterion(model)


def estimate(detector: tuple[DeformableDETR, SetCriterion], **changes: Any) -> MemoryEstimate:
    return estimate_memory(*detector, **{"batch": BATCH, "size_hw": SIZE, "num_objects": OBJECTS} | changes)


def real_step(detector: tuple[DeformableDETR, SetCriterion], precision: str) -> tuple[int, int]:
    """Bytes of the batch and of what autograd really saves of it, and the peak of what lives, on real tensors; model
    and gradients left out."""
    model, criterion = detector
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    own = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with LiveBytes(own) as live, autocast:
        images, mask, _ = memory.make_batch(BATCH, SIZE, OBJECTS, CPU)
        targets = [{"labels": torch.randint(3, (OBJECTS,)), "boxes": torch.rand(OBJECTS, 4) / 2} for _ in range(BATCH)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = criterion.total(
                criterion(model(normalize_images(images, mask, model.image_mean, model.image_std), mask), targets)
            )
        total.backward()
    return images.nbytes + mask.nbytes + sum(saved.values()), live.peak


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_is_really_kept(
    detector: tuple[DeformableDETR, SetCriterion], precision: str, checkpointing: bool
) -> None:
    """An estimate that forgot precision, checkpointing, the losses or the proposals would be off by far more."""
    detector[0].transformer.set_activation_checkpointing(checkpointing)
    expected = estimate(detector, precision=precision)
    saved, peak = real_step(detector, precision)
    assert expected.activations == pytest.approx(saved, rel=TOLERANCE)
    assert expected.peak == pytest.approx(peak, rel=TOLERANCE)
    assert saved > expected.parameters


def test_the_parts_of_the_estimate(detector: tuple[DeformableDETR, SetCriterion]) -> None:
    model = detector[0]
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    plain = estimate(detector, copies=1)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * 4
    tensors = [*model.parameters(), *model.buffers()]
    assert plain.parameters == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert (plain.gradients, plain.optimizer, plain.copies) == (trained, 2 * trained, trained)
    assert plain.total == plain.parameters + 4 * trained + plain.peak
    assert estimate(detector, optimizer_states=1).optimizer == trained
    assert estimate(detector, batch=4).activations == pytest.approx(2 * plain.activations, rel=0.01)
    assert "activations of 2 x 96 x 128 px" in plain.describe()


def test_the_estimate_changes_nothing(detector: tuple[DeformableDETR, SetCriterion]) -> None:
    """The plain variant too, whose heads are one module six times."""
    for model in (detector[0], DeformableDETR(**detector[0].config | {"two_stage": False, "with_box_refine": False})):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random_state = torch.get_rng_state()
        estimate_memory(model, build_criterion(model), batch=1, size_hw=SIZE)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(type(tensor) is Tensor for tensor in model.state_dict().values())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    600 kB\n"}
KIB = 1024


def test_free_memory_of_a_machine(tmp_path: Path) -> None:
    assert free_and_total(CPU, write(tmp_path, MACHINE)) == (600 * KIB, 1000 * KIB)
    assert free_and_total(CPU, tmp_path / "elsewhere") is None


def test_free_memory_in_a_container(tmp_path: Path) -> None:
    """Control group 2, the container sees its own group as the root; cached files count as free."""
    group = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{300 * KIB}\n",
        "sys/fs/cgroup/memory.current": f"{250 * KIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {30 * KIB}\n",
    }
    assert free_and_total(CPU, write(tmp_path, MACHINE | group)) == (80 * KIB, 300 * KIB)


def test_free_memory_in_nested_groups(tmp_path: Path) -> None:
    """Slurm and systemd: the tightest of all groups around the process counts, "max" is no limit."""
    group = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": f"{500 * KIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{100 * KIB}\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": f"{90 * KIB}\n",
    }
    assert free_and_total(CPU, write(tmp_path, MACHINE | group)) == (400 * KIB, 500 * KIB)


def test_free_memory_in_a_group_of_version_1(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "5:cpu:/docker/a\n4:memory:/docker/a\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": f"{200 * KIB}\n",
        "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": f"{150 * KIB}\n",
    }
    assert free_and_total(CPU, write(tmp_path, MACHINE | group)) == (50 * KIB, 200 * KIB)


CUDA_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore lines"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_ERROR),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("ms_deform_attn failed in triton: RuntimeError: Triton Error [CUDA]: out of memory"),
    ],
)
def test_out_of_memory_names_the_batch_and_what_helps(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    targets = [{"labels": torch.zeros(count)} for count in (3, 4)]
    with pytest.raises(InputError) as caught, explained_out_of_memory(images, targets):
        raise error
    text = str(caught.value)
    assert "2 images of 64 x 96 px and 7 objects" in text
    assert "in use" in text
    for flag in ("--device_batch_size", "--activation_checkpointing", "--precision bf16", "--data.image_size"):
        assert flag in text
    assert caught.value.__cause__ is error
    assert str(error).partition("\n")[0] in caplog.text


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explained_out_of_memory(torch.zeros(1, 3, 2, 2), []):
        raise RuntimeError("shapes differ")


@pytest.fixture
def run_train(
    shapes: Path, tiny_model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """`ddetr train` of a tiny detector: exit code and what stands on standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        flags = {f"--model.{name}": str(value).lower() for name, value in tiny_model.items()}
        flags |= {
            "--data": str(shapes),
            "--data.image_size": "64",
            "--data.num_workers": "0",
            "--output": str(tmp_path / "run"),
        }
        flags |= {"--epochs": "1", "--batch_size": "4", "--num_pictures": "0"}
        code = cli.main(["train", *(word for pair in flags.items() for word in pair), *arguments])
        return code, capsys.readouterr().err

    return run


def test_a_run_that_runs_out_of_memory_ends_with_a_sentence(
    run_train: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DeformableDETR.forward

    def too_much(model: DeformableDETR, images: Tensor, mask: Tensor | None = None) -> Any:
        if type(images) is Tensor:  # not in the estimate
            raise torch.OutOfMemoryError(CUDA_ERROR)
        return forward(model, images, mask)

    monkeypatch.setattr(DeformableDETR, "forward", too_much)
    code, err = run_train("--preflight", "false")
    assert code == 2
    assert re.search(
        r"ddetr: error: out of memory on cpu with a batch of 2 images of \d+ x \d+ px and \d+ objects", err
    )
    assert "Traceback" not in err


def test_the_estimate_stands_before_the_first_step(
    run_train: Callable[..., tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ddetr")
    code, _ = run_train("--activation_checkpointing", "true")
    assert code == 0
    messages = [message for message in caplog.messages if message.startswith(("memory of a step", "step 1"))]
    assert messages[0].startswith("memory of a step with the largest images, estimated: ")
    assert "activations of 2 x 107 x 107 px" in messages[0]  # 1333/800 of 64 pixels
    assert "; cpu has " in messages[0]
