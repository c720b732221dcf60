"""The whole way in minutes, on any machine: drawn shapes -> audit -> training -> evaluation -> pictures."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr import console
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.run.folder import free_folder
from ddetr.models.auxiliary import AuxiliaryConfig
from ddetr.models.criterion import LossWeights

if TYPE_CHECKING:
    from ddetr.engine.train import RunResult

IMAGE_SIZE = 160

# What was measured to learn most in this time (benchmarks/results/2026-11-29-convergence-parts.md): queries from
# distinct proposals, scores that tell how good the boxes are, many small steps, and averaged weights.
MODEL: dict[str, Any] = {
    "backbone": "regnetx_002",
    "pretrained_backbone": False,
    "hidden_dim": 128,
    "num_queries": 30,
    "num_feature_levels": 3,
    "enc_layers": 1,
    "dec_layers": 3,
    "dim_feedforward": 256,
    "dropout": 0.0,
    "with_box_refine": True,
    "two_stage": True,
    "query_selection": "distinct",
}
OPTIM = OptimConfig(
    lr=1e-3, lr_linear_proj_mult=1.0, clip_max_norm=1.0, schedule="cosine", warmup_steps=50, ema_decay=0.98
)
LOSS = LossWeights(classification="ia_bce")
AUXILIARY = AuxiliaryConfig(look_forward_twice=True)

# What the notebooks look into: nine times fewer cells and weights, and still a detector.
SMALL_IMAGE_SIZE = 96
SMALL_MODEL = MODEL | {
    "backbone": "test_resnet",
    "hidden_dim": 64,
    "num_queries": 15,
    "dim_feedforward": 128,
    "two_stage": False,
    "query_selection": "topk",
}
SMALL_OPTIM = replace(OPTIM, lr=2e-3, warmup_steps=20, ema_decay=None)


def demo(
    *, output: str | None = None, num_train: int = 2000, num_val: int = 200, epochs: int = 3, seed: int = 0
) -> "RunResult":
    """Train a small two-stage Deformable DETR on drawn shapes.

    Args:
        output: run folder; by default runs/demo, numbered.
        num_train: training images to draw.
        num_val: held-out images to draw.
        epochs: passes over the training images.
        seed: decides the data set and the run.
    """
    path = Path(output) if output else free_folder(Path("runs"), "demo")
    folder = _drawn(Path("runs"), num_train, num_val, IMAGE_SIZE, seed)
    more = {"loss": LOSS, "auxiliary": AUXILIARY}
    return _trained(folder, IMAGE_SIZE, path, MODEL, OPTIM, epochs=epochs, batch_size=4, seed=seed, **more)


def small_demo(output: str, *, num_train: int = 800, num_val: int = 60, epochs: int = 8, seed: int = 0) -> "RunResult":
    """The same in about a minute on two cores: smaller images, a smaller network, a weaker detector.

    Args:
        output: run folder; the shapes are drawn into `shapes-...` beside it.
        num_train: training images to draw.
        num_val: held-out images to draw.
        epochs: passes over the training images.
        seed: decides the data set and the run.
    """
    path = Path(output)
    folder = _drawn(path.parent, num_train, num_val, SMALL_IMAGE_SIZE, seed)
    return _trained(folder, SMALL_IMAGE_SIZE, path, SMALL_MODEL, SMALL_OPTIM, epochs=epochs, batch_size=16, seed=seed)


def _drawn(beside: Path, num_train: int, num_val: int, image_size: int, seed: int) -> Path:
    from ddetr.datasets import draw_shapes  # here, since it takes seconds, and the help has no use for it

    folder = beside / f"shapes-{image_size}-{num_train}-{num_val}-{seed}"
    console.show(f"Drawing {num_train} + {num_val} images of shapes into {folder}")
    with console.waiting("drawing"):
        draw_shapes(folder, num_train, num_val, image_size, seed)
    return folder


def _trained(
    folder: Path,
    image_size: int,
    output: Path,
    model: dict[str, Any],
    optim: OptimConfig,
    *,
    batch_size: int,
    **more: Any,
) -> "RunResult":
    from ddetr.engine.train import train

    return train(
        TrainConfig(
            DataConfig(path=str(folder), augmentation="plain", image_size=image_size),
            model,
            optim=optim,
            batch_size=batch_size,
            device_batch_size=batch_size,
            devices=1,
            output=str(output),
            preflight=False,  # for runs longer than this one
            **more,
        )
    )
