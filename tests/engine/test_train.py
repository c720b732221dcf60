"""`train()`: what a run leaves, and that it can be stopped, continued and repeated."""

import csv
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import Forks

from ddetr.checkpoint import build_from_checkpoint, load_checkpoint, save_checkpoint
from ddetr.datasets import draw_shapes
from ddetr.datasets.config import DataConfig
from ddetr.engine.callbacks import Clock, Publish
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.ema import WeightAverage
from ddetr.engine.prepare import Prepared, prepare
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.run_report import Report
from ddetr.engine.saving import SaveState
from ddetr.engine.train import CALLBACK_ORDER, Built, RunResult, build, callbacks, train
from ddetr.errors import InputError
from ddetr.models.auxiliary import AuxiliaryConfig
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR

EPOCHS, STEPS = 3, 2  # of the short runs: epochs, and steps per epoch


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    """Six steps whose rate changes an epoch."""
    return short_run | {"optim": OptimConfig(lr=1e-3, lr_drop=1), "epochs": EPOCHS}


def rows(path: Path) -> list[dict[str, str]]:
    """A table without its speeds, which no two runs share."""
    speeds = {"images_per_second", "data_wait"}
    with path.open() as file:
        return [{name: value for name, value in row.items() if name not in speeds} for row in csv.DictReader(file)]


def weights(run: Path, name: str = "last.pth") -> dict[str, torch.Tensor]:
    return load_checkpoint(run / name).model


def assert_same_run(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("train.csv", "val.csv"):
        assert rows(one / name) == rows(other / name)


@pytest.fixture(scope="module")
def whole_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], RunResult]:
    """The run of `settings`, undisturbed; trained once."""
    results: list[RunResult] = []

    def get(settings: dict[str, Any]) -> RunResult:
        if not results:
            results.append(train(TrainConfig(**settings, output=str(tmp_path_factory.mktemp("whole") / "run"))))
        return results[0]

    return get


def test_a_run_leaves_everything(tiny_run: RunResult, shapes: Path) -> None:
    run = tiny_run.path
    expected = (
        "config.yaml audit.json data.npz environment.json train.csv val.csv metrics.json per_class.csv last.ckpt "
        "previous.ckpt best.pth last.pth validation_best.npz validation_last.npz curves.png pictures "
        "report.html tensorboard"
    )
    assert {path.name for path in run.iterdir()} == set(expected.split())
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["000000.png", "000007.png"]
    assert all(path.stat().st_size > 1000 for path in [run / "curves.png", *(run / "pictures").iterdir()])

    training, validation = rows(run / "train.csv"), rows(run / "val.csv")
    assert [int(row["step"]) for row in training] == list(range(1, 26))  # each epoch is one step: the last of it
    assert float(training[-1]["loss"]) < float(training[0]["loss"])
    assert {
        "epoch",
        "lr_rest",
        "lr_backbone",
        "lr_linear_proj",
        "loss_ce",
        "loss_bbox",
        "loss_giou",
        "grad_norm",
    } < training[0].keys()
    assert [int(row["step"]) for row in validation] == [10, 20, 25]  # every tenth epoch, and the last

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["last"]["step"] == 25
    assert (
        metrics["last"]["AP"]
        == pytest.approx(tiny_run.metrics.AP)
        == pytest.approx(float(validation[-1]["AP"]), abs=1e-6)
    )
    assert metrics["best"]["AP"] == max(json.loads(row["AP"]) for row in validation) or metrics["best"]["AP"] > 0.1
    assert [row["name"] for row in rows(run / "per_class.csv")] == ["circle", "square", "triangle"]
    assert json.loads((run / "audit.json").read_text())["train"]["num_images"] == 8
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["path"] == str(shapes)
    assert config["model"]["backbone"] == "test_resnet"
    assert tiny_run.image_example.is_file()


def test_published_checkpoints_say_how_they_were_made(tiny_run: RunResult) -> None:
    checkpoint = load_checkpoint(tiny_run.path / "last.pth")
    assert [category.name for category in checkpoint.categories] == ["circle", "square", "triangle"]
    assert (checkpoint.input["image_size"], checkpoint.input["max_size"]) == (64, 107)
    assert checkpoint.metrics["AP"] == pytest.approx(tiny_run.metrics.AP)
    assert checkpoint.training["step"] == 25
    assert checkpoint.threshold == pytest.approx(tiny_run.metrics.threshold)
    build_from_checkpoint(checkpoint)


def test_the_callbacks_stand_in_the_order_that_is_declared(settings: dict[str, Any], tmp_path: Path) -> None:
    optim = replace(settings["optim"], ema_decay=0.9)
    config = TrainConfig(**settings | {"optim": optim, "patience": 2, "output": str(tmp_path / "run")})
    prepared = prepare(config)
    built = replace(build(prepared), clock=Clock(print))
    found = [type(callback) for callback in callbacks(prepared, built)]
    assert found == list(CALLBACK_ORDER)
    assert found.index(Publish) < found.index(Report), "the report reads what is published"
    assert found.index(Publish) < found.index(WeightAverage), "what is published are the averaged weights"
    assert found[-1] is SaveState, "a state holds what the others have become"


def test_what_trains_beside_the_network_is_kept_and_not_published(settings: dict[str, Any], tmp_path: Path) -> None:
    """Preflight, memory and the steps know it; what is published and what starts from the run's state do not."""
    settings |= {"preflight": True, "epochs": 1, "auxiliary": AuxiliaryConfig(denoising=4, one_to_many=3)}
    settings["optim"] = OptimConfig(lr=1e-3, ema_decay=0.9)
    result = train(TrainConfig(**settings, output=str(tmp_path / "beside")))
    columns = rows(result.path / "train.csv")[0]
    assert {"loss_ce_dn", "loss_giou_dn_0", "loss_bbox_o2m", "loss_ce_o2m_0"} <= columns.keys()
    state = torch.load(result.path / "last.ckpt", weights_only=True)
    beside = {name for name in state["state_dict"] if name.startswith("model.auxiliary.")}
    assert "model.auxiliary.label_embed.weight" in beside
    assert not [name for name in state["weight_average"]["tensors"] if "auxiliary" in name]
    published = load_checkpoint(result.path / "best.pth")
    assert not [name for name in published.model if "auxiliary" in name]
    build_from_checkpoint(published)

    settings |= {"preflight": False, "auxiliary": AuxiliaryConfig(), "weights": str(result.path / "last.ckpt")}
    start = build(prepare(TrainConfig(**settings, output=str(tmp_path / "again")))).module.model
    for name, tensor in start.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, published.model[name])


def test_a_second_run_overwrites_nothing(tiny_run: RunResult, settings: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.path.rglob("*")}
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        train(TrainConfig(**settings, output=str(tiny_run.path)))
    assert {path: path.stat().st_mtime_ns for path in tiny_run.path.rglob("*")} == before


def test_runs_without_a_name_get_numbered_folders(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [train(TrainConfig(**settings | {"epochs": 1})).path for _ in range(2)]
    assert paths == [Path("runs/shapes"), Path("runs/shapes-2")]
    assert_same_run(*paths)  # the same seed twice, and nothing carried over
    assert train(TrainConfig(**settings | {"epochs": 1, "resume": "last"})).path == Path("runs/shapes-2")
    other = train(TrainConfig(**settings | {"epochs": 1, "seed": 1})).path
    assert not torch.equal(weights(other)["query_embed.weight"], weights(paths[0])["query_embed.weight"])


def test_a_killed_run_resumes_exactly(
    settings: dict[str, Any], whole_run: Callable[[dict[str, Any]], RunResult], forks: Forks, tmp_path: Path
) -> None:
    """Killed in the second epoch, after it has written a row that the checkpoint does not know of."""
    run = tmp_path / "run"
    program = """
import os, signal, sys
from ddetr.engine.callbacks import Watch
from ddetr.cli.main import main
steps = 0
original = Watch.on_train_batch_end
def die_at_step_three(self, *arguments):
    global steps
    original(self, *arguments)
    steps += 1
    if steps == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Watch.on_train_batch_end = die_at_step_three
sys.exit(main(sys.argv[1:]))
"""
    config = tmp_path / "config.yaml"
    config.write_bytes((whole_run(settings).path / "config.yaml").read_bytes())
    command = ["train", "--config", str(config), "--output", str(run), "--log_every", "1", "--num_pictures", "0"]
    (tmp_path / "program.py").write_text(program)
    killed = forks(tmp_path / "program.py", *command, processes=0, DDETR_RUN="stale")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert [row["step"] for row in rows(run / "train.csv")] == ["1", "2", "3"]

    result = train(TrainConfig(**settings, output=str(run), resume="last"))
    assert_same_run(run, whole_run(settings).path)
    assert result.metrics.to_dict() == whole_run(settings).metrics.to_dict()


def test_the_rates_follow_the_schedule(
    settings: dict[str, Any], whole_run: Callable[[dict[str, Any]], RunResult]
) -> None:
    """lr_drop is one epoch: two steps at each rate; the backbone starts from nothing and has the full one."""
    table = rows(whole_run(settings).path / "train.csv")
    for name, rate in (("lr_rest", 1e-3), ("lr_backbone", 1e-3), ("lr_linear_proj", 1e-4)):
        expected = [rate * 0.1**epoch for epoch in range(EPOCHS) for _ in range(STEPS)]
        assert [float(row[name]) for row in table] == pytest.approx(expected)
    assert [int(row["epoch"]) for row in table] == [0, 0, 1, 1, 2, 2]


def test_a_complete_run_resumed_says_its_metrics_again(
    settings: dict[str, Any], whole_run: Callable[[dict[str, Any]], RunResult]
) -> None:
    whole = whole_run(settings)
    before = (whole.path / "last.pth").stat().st_mtime_ns
    again = train(TrainConfig(**settings, resume=str(whole.path)))
    assert again.metrics.to_dict() == whole.metrics.to_dict()
    assert (whole.path / "last.pth").stat().st_mtime_ns == before
    assert len(rows(whole.path / "train.csv")) == EPOCHS * STEPS


def test_resuming_with_other_settings_is_refused(
    settings: dict[str, Any], whole_run: Callable[[dict[str, Any]], RunResult]
) -> None:
    run = str(whole_run(settings).path)
    with pytest.raises(InputError, match=r"but optim\.lr was 0\.001 and is 0\.01, epochs was 3 and is 2"):
        train(TrainConfig(**settings | {"epochs": 2, "optim": OptimConfig(lr=1e-2, lr_drop=1), "resume": run}))


def test_the_last_epoch_is_always_measured(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(TrainConfig(**settings | {"val_every": 2, "output": str(tmp_path / "run")}))
    assert [row["epoch"] for row in rows(result.path / "val.csv")] == ["1", "2"]
    assert load_checkpoint(result.path / "last.pth").training["step"] == EPOCHS * STEPS


def test_starting_from_the_weights_of_a_run_with_other_classes(
    tiny_run: RunResult, settings: dict[str, Any], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for split in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        content["categories"] = [{"id": 5, "name": "hexagon"}, {"id": 9, "name": "triangle"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 9 if annotation["category_id"] == 3 else 5
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (tmp_path / split).symlink_to(shapes / split)
    best = tiny_run.path / "best.pth"
    frozen = {"lr": 0.0, "weight_decay": 0.0}  # nothing moves: what is published is what was loaded
    result = train(
        TrainConfig(
            **settings
            | {
                "data": DataConfig(str(tmp_path), image_size=64, num_workers=0),
                "optim": OptimConfig(**frozen),
                "epochs": 1,
                "weights": str(best),
                "output": str(tmp_path / "run"),
            }
        )
    )
    shown = capsys.readouterr().out
    assert "best.pth (ddetr)" in shown
    assert "adapted" in shown
    old, new = weights(tiny_run.path, "best.pth"), weights(result.path)
    assert torch.equal(new["query_embed.weight"], old["query_embed.weight"])
    assert new["class_embed.0.weight"].shape == (2, 32)
    assert torch.equal(new["class_embed.0.weight"][1], old["class_embed.0.weight"][2])  # triangle, by its name


def test_the_network_is_that_of_the_weights_where_nothing_else_is_said(
    tiny_run: RunResult, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainConfig(
        **settings
        | {
            "model": {"num_queries": 7, "dropout": 0.25},
            "weights": str(tiny_run.path / "best.pth"),
            "output": str(tmp_path / "run"),
        }
    )
    train(replace(config, epochs=1))
    expected = {**load_checkpoint(tiny_run.path / "best.pth").config, "num_queries": 7, "dropout": 0.25}
    for name in ("pretrained_backbone", "freeze_backbone"):  # these are of the training
        del expected[name]
    assert expected.items() <= load_checkpoint(tmp_path / "run" / "last.pth").config.items()

    before = load_checkpoint(tmp_path / "run" / "last.pth").config
    train(replace(config, epochs=2, resume=str(tmp_path / "run")))  # the same options go on with it
    assert load_checkpoint(tmp_path / "run" / "last.pth").config == before


def test_options_that_do_not_go_with_the_network_of_the_weights_are_taken_as_they_are(
    tiny_run: RunResult, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = load_checkpoint(tiny_run.path / "best.pth")
    weights = tmp_path / "mixed.pth"
    two_stage = {"with_box_refine": True, "two_stage": True, "mixed_selection": True}
    network = DeformableDETR(**published.config | two_stage)
    save_checkpoint(weights, replace(published, config=network.config, model=network.state_dict()))
    plain = {name: value for name, value in settings["model"].items() if name not in two_stage}
    config = TrainConfig(
        **settings
        | {
            "model": plain | {"with_box_refine": False, "two_stage": False},  # without a word on mixed_selection
            "weights": str(weights),
            "epochs": 1,
            "output": str(tmp_path / "run"),
        }
    )
    with caplog.at_level("INFO"):
        train(config)
    assert "the network is as the options say" in caplog.text
    assert not load_checkpoint(tmp_path / "run" / "last.pth").config["mixed_selection"]


def test_weights_of_another_architecture_are_refused(
    tiny_run: RunResult, settings: dict[str, Any], tmp_path: Path
) -> None:
    best = str(tiny_run.path / "best.pth")
    with pytest.raises(InputError, match="expected weights of hidden_dim 64"):
        train(
            TrainConfig(
                **settings
                | {"model": settings["model"] | {"hidden_dim": 64}, "weights": best, "output": str(tmp_path / "run")}
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_broken_loss_stops_the_run_and_spares_its_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """In the first step of the second epoch, whether or not that step is logged."""
    original, calls = SetCriterion.total, []

    def broken(self: SetCriterion, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        if type(losses["loss_ce"]) is torch.Tensor:  # not those of the estimate of the memory
            calls.append(1)
        return original(self, losses) * (float("nan") if len(calls) > STEPS * 2 else 1.0)

    monkeypatch.setattr(SetCriterion, "total", broken)
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"step 3 has loss nan .*--optim.lr.*its last checkpoint is intact.*last.ckpt"
    ):
        train(TrainConfig(**settings | {"output": str(run), "log_every": log_every, "max_bad_steps": 0}))
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    for model in (state["state_dict"], weights(run), weights(run, "best.pth")):
        assert all(torch.isfinite(tensor).all() for tensor in model.values())

    monkeypatch.undo()
    resumed = train(TrainConfig(**settings | {"output": str(run), "resume": "last"}))
    assert len(rows(resumed.path / "train.csv")) >= STEPS * 2


def test_a_broken_gradient_stops_the_run_before_it_is_published(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SetCriterion.total

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, total: torch.Tensor) -> torch.Tensor:
            return total.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    monkeypatch.setattr(SetCriterion, "total", lambda self, losses: Breaks.apply(original(self, losses)))
    with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf)"):
        train(TrainConfig(**settings | {"output": str(tmp_path / "run"), "max_bad_steps": 0}))
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_ctrl_c_is_a_keyboard_interrupt(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = RunFolder.append_row

    def interrupted(self: RunFolder, name: str, row: dict[str, Any]) -> None:
        original(self, name, row)
        if row["step"] == STEPS + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append_row", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with caplog.at_level("INFO", "ddetr"), pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings | {"output": str(tmp_path / "run")}))
    assert signal.getsignal(signal.SIGINT) is handler
    assert "the same command with --resume" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"device_batch_size": 0}, "device_batch_size must be at least 1"),
        ({"seed": -1}, "seed must lie in 0 to"),
        ({"max_bad_steps": -1}, "max_bad_steps must be at least 0, got -1"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"batch_size": 9}, "fewer than one batch of 9"),
        ({"weights": "nowhere.pth"}, "there is no nowhere.pth"),
        ({"model": {"num_querys": 3}}, r"is no setting that can be made \(did you mean num_queries\?\)"),
        ({"model": {"num_classes": 3}}, "'num_classes' is no setting that can be made: it comes from the data"),
        ({"model": {"backbone": "resnet18x", "pretrained_backbone": False}}, "unknown backbone 'resnet18x'"),
    ],
)
def test_settings_that_cannot_work_leave_no_folder(
    settings: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**settings | {"output": str(tmp_path / "run")} | wrong))
    assert not (tmp_path / "run").exists()


def test_a_refused_data_set_is_not_trained_on(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = draw_shapes(tmp_path / "shapes", 4, 1, 64)
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"][:2]:
        annotation["bbox"][0] = float("nan")
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the audit refused the data set: .*and 1 more findings in the table above"):
        train(TrainConfig(**settings | {"data": DataConfig(str(folder)), "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output: the folder .*/file/run cannot be made"):
        train(TrainConfig(**settings | {"output": str(tmp_path / "file" / "run")}))


def test_a_validation_image_that_breaks_costs_that_image(
    settings: dict[str, Any], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole before the first step, and damaged afterwards; the run that goes on is the same."""
    shutil.copytree(shapes, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val").iterdir())[1]

    def build_then_break(prepared: Prepared) -> Built:
        broken.write_bytes(broken.read_bytes()[:-200] + b"\xff\xc0" * 100)
        return build(prepared)

    monkeypatch.setattr("ddetr.engine.train.build", build_then_break)
    data = replace(settings["data"], path=str(tmp_path / "data"))
    options = settings | {"data": data, "epochs": 2}
    whole = train(TrainConfig(**options, output=str(tmp_path / "whole")))
    num_images = len(list(broken.parent.iterdir()))
    assert whole.metrics.num_images == num_images - 1
    metrics = json.loads((whole.path / "metrics.json").read_text())
    for which in ("last", "best"):
        found = metrics[which]["measured_on"]
        assert (found["num_images"], found["num_images_listed"]) == (num_images - 1, num_images)
        assert [image["path"] for image in found["unreadable"]] == [str(broken)]
    assert [row["images_left_out"] for row in rows(whole.path / "val.csv")] == ["1", "1"]
    assert f"{num_images - 1} of {num_images} images: the others" in (whole.path / "report.html").read_text()
    assert (whole.path / "best.pth").is_file()
    first = train(TrainConfig(**options | {"epochs": 1}, output=str(tmp_path / "first")))
    train(TrainConfig(**options, output=str(first.path), resume="last"))
    assert_same_run(whole.path, first.path)


def test_a_damaged_validation_image_is_told_before_the_first_step(
    settings: dict[str, Any], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    names = sorted((tmp_path / "data" / "val").iterdir())
    names[1].write_bytes(names[1].read_bytes()[:-2])
    data = replace(settings["data"], path=str(tmp_path / "data"))
    [finding] = prepare(TrainConfig(**settings | {"data": data}, output=str(tmp_path / "run"))).audit.findings
    assert (finding.kind, finding.action, finding.where) == ("unreadable-image", "dropped", str(names[1]))
    with pytest.raises(InputError, match=f"refused the data set: .*{names[1].name}"):
        prepare(TrainConfig(**settings | {"data": replace(data, on_bad_image="raise")}, output=str(tmp_path / "run")))
    for name in names:
        name.write_bytes(name.read_bytes()[:-200])
    with pytest.raises(InputError, match="refused the data set"):
        prepare(TrainConfig(**settings | {"data": data}, output=str(tmp_path / "run")))
