import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.datasets.config import DataConfig
from ddetr.datasets.splits import load_splits
from ddetr.engine import batch_size
from ddetr.engine.config import OptimConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.memory import MemoryEstimate, estimate_memory
from ddetr.engine.module import DetectionModule
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.deformable_detr import DeformableDETR, build_criterion


@pytest.fixture
def short_run(shapes: Path, tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `train()`: two epochs of two steps, with all that draws random numbers: augmentation and dropout."""
    return {
        "data": DataConfig(str(shapes), image_size=64, num_workers=0),
        "model": tiny_model | {"dropout": 0.1},
        "optim": OptimConfig(lr=1e-3),
        "epochs": 2,
        "batch_size": 4,
        "device_batch_size": 2,
        "log_every": 1,
        "num_pictures": 0,
        "preflight": False,
    }


@pytest.fixture(scope="session", autouse=True)
def _one_estimate_of_a_kind() -> Iterator[None]:
    """Every run estimates the memory of a step, in most of a second: here once for each kind of detector and batch.
    test_memory.py calls the estimate itself."""
    known: dict[str, MemoryEstimate] = {}

    def estimate(model: nn.Module, criterion: nn.Module, **arguments: Any) -> MemoryEstimate:
        scalars = [
            {name: value for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, dict))}
            for part in (*model.modules(), *criterion.modules())
            if not isinstance(part, nn.ModuleList)
        ]
        weights = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
        key = repr((scalars, weights, arguments))
        if key not in known:
            known[key] = estimate_memory(model, criterion, **arguments)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "estimate_memory", estimate)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """`forks(SCRIPT, *arguments, processes=2)` runs a script as torchrun does: see forks.py."""
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 96 x 64 pixels a split, with three objects each, whose classes have ids that do not count from
    0."""
    folder = tmp_path_factory.mktemp("data") / "oblong"
    generator = torch.Generator().manual_seed(0)
    categories = [{"id": number, "name": name} for number, name in ((7, "seven"), (3, "three"), (90, "ninety"))]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        images, objects = [], []
        for image_id in range(11, 17):
            name = f"{split}-{image_id}.png"
            pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
            to_pil_image(pixels).save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": 64, "width": 96})
            for number in range(3):
                left, top = (int(torch.randint(0, high, (), generator=generator)) for high in (60, 30))
                box = [left, top, 20 + number * 4, 16 + number * 5]
                category = categories[(image_id + number) % 2 + (image_id == 16)]["id"]
                objects.append(
                    {"id": len(objects) + 1, "image_id": image_id, "category_id": category, "bbox": box}
                    | {"area": box[2] * box[3], "iscrowd": 0}
                )
        content = {"images": images, "annotations": objects, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def set_up(oblong: Path, tiny_model: dict[str, Any]) -> Callable[..., tuple[DetectionModule, DetectionData]]:
    """Builds the module and the data of a run on `oblong`."""

    def build(
        max_detections: int = 100, augmentation: str = "official", **changes: Any
    ) -> tuple[DetectionModule, DetectionData]:
        optim = changes.pop("optim", OptimConfig(lr=2e-3))
        config = DataConfig(str(oblong), image_size=64, num_workers=0, augmentation=augmentation)
        train_set, val_set = load_splits(config)
        data = DetectionData(train_set, val_set, config, batch_size=4, device_batch_size=2, seed=1)
        torch.manual_seed(0)
        model = DeformableDETR(**tiny_model | {"dropout": 0.1, "num_classes": 3} | changes)
        module = DetectionModule(
            model,
            build_criterion(model),
            optim,
            CocoEvaluator(val_set, max_detections),
            backbone_pretrained=False,
            steps_per_epoch=1,
            total_steps=1,
            seed=3,
        )
        return module, data

    return build
