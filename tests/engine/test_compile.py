"""torch.compile of the training step: one graph per shape, no break in it, and the eager model's numbers.

Dynamo traces as it does in training; what it hands the graph to is a back end that runs it as it stands, in seconds.
"""

import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ddetr.checkpoint import load_checkpoint
from ddetr.datasets.config import DataConfig
from ddetr.engine import compile as engine_compile
from ddetr.engine.compile import CompiledForward, check_compiler
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

SHAPES = [(64, 96), (96, 64)]
VARIANTS: dict[str, dict[str, Any]] = {
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True, "backbone": "resnet18"},
    "base": {"num_feature_levels": 4},
    "refine": {"num_feature_levels": 4, "with_box_refine": True},
    "two_stage": {"num_feature_levels": 4, "with_box_refine": True, "two_stage": True},
}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that Dynamo made, in a process that has compiled nothing yet."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(engine_compile, "BACKEND", keep)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would collect them, for seconds
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield found
    torch._dynamo.reset()


def make(config: dict[str, Any]) -> DeformableDETR:
    torch.manual_seed(0)
    return DeformableDETR(**config | {"num_classes": 5}).train()


@pytest.fixture
def small(tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the base variant."""
    return tiny_model | {"with_box_refine": False}


def batch(shape: tuple[int, int], n: int = 2, *, masked: bool = True) -> tuple[Tensor, Tensor | None]:
    images = torch.randn(n, 3, *shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(n, *shape, dtype=torch.bool)
    mask[0, :, shape[1] // 2 :] = True
    return images, mask if masked else None


def losses_and_gradients(
    forward: Any, model: nn.Module, criterion: SetCriterion, images: Tensor, mask: Tensor | None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    targets = [
        {"labels": torch.tensor([0, 3]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.2, 0.6, 0.3, 0.1]])},
        {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    losses = criterion(forward(images, mask), targets)
    criterion.total(losses).backward()
    values = {name: float(value.detach()) for name, value in losses.items()}
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_breaks_its_graph(small: dict[str, Any], graphs: list[torch.fx.GraphModule], variant: str) -> None:
    """One graph holds the whole forward pass, with and without a mask; after a break there would be two."""
    model = make(small | VARIANTS[variant])
    compiled = torch.compile(model, dynamic=False, backend=engine_compile.BACKEND)  # which may break
    # Where a mask counts, in the pyramid and in the proposals, both; each of the others takes seconds.
    for count, masked in enumerate((True, False) if variant in ("single_scale", "two_stage") else (True,), start=1):
        images, mask = batch(SHAPES[0], masked=masked)
        assert compiled(images, mask).keys() >= {"pred_logits", "pred_boxes", "aux_outputs"}
        assert len(graphs) == count
    assert sum(counters["graph_break"].values()) == 0
    assert all(len(graph.graph.nodes) > 100 for graph in graphs)


@pytest.mark.parametrize(("masked", "checkpointing"), [(True, False), (False, True)])
def test_losses_and_gradients_are_the_eager_ones(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, masked: bool, checkpointing: bool
) -> None:
    """Through the compiler's autograd and the operator's own formulas, dropout on; without a mask, with an idle one."""
    monkeypatch.setattr(engine_compile, "BACKEND", "aot_eager")
    model = make(small | {"two_stage": True, "with_box_refine": True, "dropout": 0.1})
    model.transformer.set_activation_checkpointing(checkpointing)
    criterion = build_criterion(model)
    images, mask = batch(SHAPES[0], masked=masked)
    expected, expected_gradients = losses_and_gradients(model, model, criterion, images, mask)
    forward = CompiledForward(model, SHAPES)
    losses, gradients = losses_and_gradients(forward, model, criterion, images, mask)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-4 * expected_gradients[name].norm(), name


def test_no_more_graphs_than_shapes(small: dict[str, Any], graphs: list[torch.fx.GraphModule]) -> None:
    """With and without mask, in any order and of any size, after an evaluation in between: a shape is compiled once."""
    model = make(small | {"dropout": 0.0})
    forward = CompiledForward(model, SHAPES)
    for round_ in range(3):
        for h, w in SHAPES:
            for masked in (True, False):
                images, mask = batch((h - 10 * round_, w - round_), masked=masked)
                outputs = forward(images, mask)
        assert outputs["pred_boxes"].shape == (2, 12, 4)
        with torch.no_grad():
            model.eval()(*batch((64, 64 + 32 * round_)))
        model.train()
    assert len(graphs) == len(SHAPES)
    # Names, copies and pickles are those of the plain model: EMA and checkpoints depend on it.
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == list(make(small).state_dict())
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in make(small).named_parameters()]


def test_other_shapes_run_eagerly(
    small: dict[str, Any], graphs: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    """An image of extreme proportions, or a third batch size, costs no compilation and stops no run."""
    caplog.set_level("INFO", logger="ddetr")
    model = make(small | {"dropout": 0.0})
    forward = CompiledForward(model, SHAPES[:1])
    for _ in range(2):
        images, mask = batch((32, 160))  # longer than any
        assert torch.equal(forward(images, mask)["pred_logits"], model(images, mask)["pred_logits"])
    for n in (1, 2, 3):
        forward(*batch(SHAPES[0], n))
    assert len(graphs) == 2
    assert [message for message in caplog.messages if "eagerly" in message] == [
        "batches of 2 x 32 x 160 are none of those compiled and run eagerly",
        "batches of 3 x 64 x 96 are none of those compiled and run eagerly",
    ]


def test_what_the_compiler_cannot_do_is_said_in_a_sentence(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(engine_compile, "BACKEND", broken)
    with pytest.raises(InputError, match=r"could not compile the model for batches of 2 x 64 x 96 .*without --compile"):
        CompiledForward(make(small), SHAPES)(*batch(SHAPES[0]))


def test_a_machine_without_a_compiler_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)
    with pytest.raises(InputError, match="compiler, and none was found"):
        check_compiler("cpu")


def settings(shapes: Path, tiny_model: dict[str, Any], weights: Path) -> dict[str, Any]:
    return {
        "data": DataConfig(str(shapes), augmentation="none", image_size=64, num_workers=0),
        "model": tiny_model | {"dropout": 0.0},
        "optim": OptimConfig(lr=0.1, sgd=True),
        "weights": str(weights),
        "compile": True,
        "epochs": 1,
        "batch_size": 4,
        "log_every": 1,
        "num_pictures": 0,
    }


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_a_run_compiles_and_says_so(
    shapes: Path,
    tiny_run: Any,
    tiny_model: dict[str, Any],
    tmp_path: Path,
    graphs: list[torch.fx.GraphModule],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its validation, whose shapes are any, compiles nothing; its checkpoint is that of any run."""
    caplog.set_level("INFO", logger="ddetr")
    run = train(TrainConfig(**settings(shapes, tiny_model, tiny_run.path / "last.pth"), output=str(tmp_path / "run")))
    assert len(graphs) == 1
    assert [message for message in caplog.messages if message.startswith(("compiling", "batches are padded"))] == [
        "batches are padded to 3 shapes: 128 x 128, 64 x 128, 128 x 64",
        "compiling for batches of 2 x 64 x 128: this step takes a minute or more",
    ]
    checkpoint = load_checkpoint(run.path / "last.pth").model
    assert checkpoint.keys() <= load_checkpoint(tiny_run.path / "last.pth").model.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_two_compiled_processes_are_one(
    shapes: Path, tiny_run: Any, tiny_model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DDP, with checkpointed layers, through the compiler's autograd."""
    monkeypatch.setattr(engine_compile, "BACKEND", "aot_eager")
    common = settings(shapes, tiny_model, tiny_run.path / "last.pth") | {"activation_checkpointing": True}
    alone = train(TrainConfig(**common, device_batch_size=1, output=str(tmp_path / "alone")))
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom ddetr.engine import compile\ncompile.BACKEND = 'aot_eager'\n"
        "from ddetr.cli.main import main\nsys.exit(main())\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "train"]
    options = ["--config", str(alone.path / "config.yaml"), "--output", str(tmp_path / "both"), "--num_pictures", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compiling for batches of 1 x 64 x 128" in done.stderr
    one, both = (load_checkpoint(tmp_path / name / "last.pth").model for name in ("alone", "both"))
    start = load_checkpoint(tiny_run.path / "last.pth").model
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
    for name in one:
        assert torch.allclose(one[name], both[name], rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_compiler_gives_the_eager_losses_and_gradients(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_compile, "BACKEND", "inductor")
    check_compiler("cpu")
    model = make(small | {"dropout": 0.0, "with_box_refine": True})
    model.transformer.set_activation_checkpointing(True)
    criterion = build_criterion(model)
    expected, expected_gradients = losses_and_gradients(model, model, criterion, *batch(SHAPES[0]))
    losses, gradients = losses_and_gradients(CompiledForward(model, SHAPES), model, criterion, *batch(SHAPES[0]))
    assert losses == pytest.approx(expected, rel=1e-4)
    whole = sum(gradient.square().sum() for gradient in expected_gradients.values()).sqrt()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-5 * whole, name
