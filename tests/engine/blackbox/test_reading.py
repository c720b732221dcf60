"""Bundles from anybody: a sentence each, and nothing written elsewhere, hung or taken down."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_steps import a_step

from ddetr.cli import main as cli
from ddetr.datasets import load_annotations
from ddetr.engine.blackbox.bundle import write_bundle
from ddetr.engine.blackbox.replay import replay
from ddetr.engine.config import OptimConfig
from ddetr.engine.optimizer import build_optimizer
from ddetr.engine.step import Step
from ddetr.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A bundle of a step that never failed."""
    model_settings = {"backbone": "test_resnet", "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1}
    model, criterion, batch, num_boxes = a_step(shapes, model_settings | {"num_feature_levels": 1, "num_queries": 5})
    step = Step(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer([{"params": list(model.parameters())}], OptimConfig(), fused=False),
        optim=OptimConfig(),
        batch=batch[:1],
        num_boxes=num_boxes,
        number=3,
        epoch=0,
        seed=4,
        run_seed=5,
        rank=0,
        world_size=1,
    )
    annotations = load_annotations(shapes, "train")
    path = write_bundle(
        tmp_path_factory.mktemp("run"), step, "it failed", None, config={}, annotations=annotations, error=None
    )
    assert path is not None
    return Path(path)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "bundle")


def change(bundle: Path, **values: Any) -> None:
    header = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(header | values))


def change_state(bundle: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(bundle / "state.pt", weights_only=True)
    spoil(state)
    torch.save(state, bundle / "state.pt")


def test_an_untouched_bundle_replays_and_draws(bundle: Path) -> None:
    result = replay(str(bundle), device="cpu")
    assert len(result.pictures) == 2
    assert all(picture.parent == bundle / "images" and picture.is_file() for picture in result.pictures)
    assert len(replay(str(bundle), device="cpu").pictures) == 2  # and again, over the first ones


@pytest.mark.parametrize(
    "values",
    [
        {"threads": 1_000_000},
        {"threads": 0},
        {"threads": "2"},
        {"images": [{"micro_batch": 0, "row": 0, "image_id": "../../../outside"}]},
        {"images": [{"micro_batch": 0, "row": -1, "image_id": 1}]},
        {"images": {}},
        {"autocast": "load"},
        {"device": "meta"},
        {"matmul_precision": "x"},
        {"step_seed": 2**70},
        {"num_boxes": 0},
        {"num_boxes": "nan"},
        {"loss": "a lot"},
        {"loss": 10**400},
        {"categories": [1]},
        {"groups": [["no.such.parameter"]]},
        {"groups": "x"},
        {"frozen": ["no.such.parameter"]},
        {"loss_weights": {"no_such_weight": 1.0}},
        {"loss_weights": None},
        {"loss_weights": {"classification": "none"}},
        {"auxiliary": {"denoising": 10**9}},
        {"auxiliary": {"denoising": 1.5}},
        {"auxiliary": {"no_such_option": 1}},
        {"auxiliary": 3},
        {"model": []},
        {"model": {"num_queries": 10**12}},
        {"model": {"backbone": "vit_giant_patch14_dinov2"}},
        {"model": {"backbone": "x" * 5_000_000}},
        {"model": {"hidden_dim": "x"}},
        {"error": "x"},
        {"versions": 3},
        {"format": [1]},
    ],
    ids=lambda values: str(values)[:40],
)
def test_what_bundle_json_says_is_not_believed(bundle: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    change(bundle, **values)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="replay: ") as caught:
        replay(str(bundle), device="cpu")
    assert len(str(caught.value)) < 2000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 1, "threads": ' + "9" * 5000 + "}", '{"format": NaN}', "{}"]
)
def test_json_that_is_no_description(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(InputError, match="damaged|has format"):
        replay(str(bundle), device="cpu")


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "stride 0": lambda state: state["batch"][0].update(images=torch.zeros(1, dtype=torch.uint8).expand(2**40)),
    "weights of stride 0": lambda state: state["weights"].update(a=torch.zeros(1).expand(2**20, 2**20)),
    "one storage a hundred times": lambda state: state.update(more=[torch.zeros(10_000_000)[1:] for _ in "a"] * 100),
    "meta": lambda state: state["weights"].update(a=torch.zeros(5, device="meta")),
    "sparse": lambda state: state["weights"].update(a=torch.eye(3).to_sparse()),
    "no batch": lambda state: state.update(batch=[]),
    "flat images": lambda state: state["batch"][0].update(images=torch.zeros(5)),
    "complex images": lambda state: state["batch"][0].update(images=torch.zeros(2, 3, 8, 8, dtype=torch.complex64)),
    "mask of another size": lambda state: state["batch"][0].update(mask=torch.zeros(2, 1, 1, dtype=torch.bool)),
    "boxes that fit no labels": lambda state: state["batch"][0]["targets"][0].update(boxes=torch.zeros(7, 4)),
    "labels of floats": lambda state: state["batch"][0]["targets"][0].update(labels=torch.zeros(0)),
    "scale": lambda state: state.update(scaler={"scale": "x"}),
    "optimiser": lambda state: state.update(optimizer={"state": {}, "param_groups": [{}, {}]}),
    "rates": lambda state: state["optimizer"]["param_groups"][0].update(betas="x"),
    "complex weights": lambda state: state["weights"].update(a=torch.zeros(5, dtype=torch.complex64)),
    "weights": lambda state: state.update(weights=[]),
    "a list": lambda state: state.clear(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_what_state_pt_holds_is_not_believed(bundle: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    change_state(bundle, spoil)
    with pytest.raises(InputError, match="replay: .*(damaged|not one of this version)"):
        replay(str(bundle), device="cpu")


def test_a_compressed_archive_is_refused(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / "state.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(bundle / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"state\.pt is damaged \(its records are compressed"):
        replay(str(bundle), device="cpu")


@pytest.mark.parametrize("name", ["bundle.json", "state.pt"])
def test_a_pipe_does_not_hang(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(InputError, match="replay: "):
        replay(str(bundle), device="cpu")


def test_pictures_never_go_through_a_link(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bundle / "images").symlink_to(elsewhere)
    assert cli.main(["replay", str(bundle), "--device", "cpu"]) == 0
    assert "no pictures" in capsys.readouterr().out
    assert list(elsewhere.iterdir()) == []
    (bundle / "images").unlink()
    (bundle / "images").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("kept")
    names = [path.name for path in replay(str(bundle), device="cpu").pictures]
    for name in names:
        (bundle / "images" / name).unlink()
        (bundle / "images" / name).symlink_to(precious)
    assert len(replay(str(bundle), device="cpu").pictures) == len(names)
    assert precious.read_text() == "kept"

    def full(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ddetr.engine.blackbox.replay.write_folder_atomically", full)
    result = replay(str(bundle), device="cpu")
    assert result.pictures == []
    assert "Read-only file system" in result.render()


def test_an_image_that_is_all_padding_is_drawn(bundle: Path) -> None:
    padding = torch.ones(2, 64, 64, dtype=torch.bool)
    change_state(bundle, lambda state: state["batch"][0].update(mask=padding))
    assert len(replay(str(bundle), device="cpu").pictures) == 2


def test_more_threads_than_this_machine_can_start_are_said(bundle: Path) -> None:
    change(bundle, threads=1000)
    result = replay(str(bundle), device="cpu")
    assert "the step had 1000 threads" in result.verdict
