"""What a run does about full disks, other data, more epochs and wrong options: it goes on, or says why it cannot."""

import csv
import errno
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.checkpoint import load_checkpoint
from ddetr.datasets.config import DataConfig, DataSource
from ddetr.datasets.splits import image_names, load_splits
from ddetr.engine import callbacks
from ddetr.engine import prepare as preparing
from ddetr.engine import train as training
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.loggers import Loggers
from ddetr.engine.prepare import prepare
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.saving import SaveState
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.inference.evaluate_checkpoint import evaluate_checkpoint

EPOCHS, STEPS = 2, 2  # of `short_run`: epochs, and steps per epoch


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two epochs by the name of their schedule, filled by `run_of`."""
    return {}


@pytest.fixture
def run_of(finished: dict[str, Path], short_run: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[Path, dict]]:
    """A copy of a finished run, and the arguments of `train` that continue it."""

    def get(schedule: str = "step") -> tuple[Path, dict[str, Any]]:
        settings = short_run | {"optim": OptimConfig(lr=1e-3, lr_drop=1, schedule=schedule)}
        if schedule not in finished:
            finished[schedule] = tmp_path / schedule
            train(TrainConfig(**settings, output=str(finished[schedule])))
        run = shutil.copytree(finished[schedule], tmp_path / "copy")
        return run, settings | {"output": str(run), "resume": "last"}

    return get


def sessions(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "environment.json").read_text())["sessions"]


def rates(run: Path) -> list[float]:
    with (run / "train.csv").open() as file:
        return [float(row["lr_rest"]) for row in csv.DictReader(file)]


# --- more epochs


def test_a_complete_run_that_is_resumed_adds_no_session(run_of: Callable[..., tuple[Path, dict]]) -> None:
    run, settings = run_of()
    before = sessions(run)
    train(TrainConfig(**settings))
    assert sessions(run) == before
    assert [session["state"] for session in before] == ["finished"]
    for damaged in ("[]", "{", '{"last": {}}'):
        (run / "metrics.json").write_text(damaged)
        with pytest.raises(InputError, match=r"is complete, but metrics.json cannot be read .*: measure again with"):
            train(TrainConfig(**settings))


def test_a_run_that_is_extended_is_the_longer_run(
    run_of: Callable[..., tuple[Path, dict]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit, where the rates depend on the epoch alone."""
    run, settings = run_of()
    with caplog.at_level("INFO", "ddetr"):
        train(TrainConfig(**settings | {"epochs": EPOCHS + 1}))
    assert "extended from 2 to 3 epochs, with the rates that it would have had" in caplog.text
    whole = tmp_path / "whole"
    train(TrainConfig(**settings | {"epochs": EPOCHS + 1, "output": str(whole), "resume": None}))
    mine, other = (load_checkpoint(folder / "last.pth").model for folder in (run, whole))
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert rates(run) == rates(whole)
    assert [session["state"] for session in sessions(run)] == ["finished", "finished"]
    assert RunFolder(run).settings()["epochs"] == EPOCHS + 1
    with pytest.raises(InputError, match="epochs was 3 and is 2"):
        train(TrainConfig(**settings))


def test_a_cosine_that_is_extended_is_said_to_be_another(
    run_of: Callable[..., tuple[Path, dict]], caplog: pytest.LogCaptureFixture
) -> None:
    run, settings = run_of("cosine")
    before = rates(run)
    with caplog.at_level("INFO", "ddetr"):
        train(TrainConfig(**settings | {"epochs": EPOCHS * 2}))
    assert "the rates fall to a hundredth over 4 epochs as a cosine, so they jump up first" in caplog.text
    after = rates(run)
    assert after[: len(before)] == before
    assert after[len(before)] == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5)), "halfway through the longer cosine"


def test_an_extension_says_where_augmentation_is_off() -> None:
    for options, said in (({"blur": 0.5, "augmentation_off_epochs": 2}, True), ({"blur": 0.5}, False), ({}, False)):
        config = TrainConfig(DataConfig("x", **options), epochs=5)
        assert ("is on again until 2 epochs before the new end" in training._said_of_extension(config)) == said


# --- other data


def test_changed_data_are_refused_or_accepted(
    run_of: Callable[..., tuple[Path, dict]], shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, settings = run_of()
    data = shutil.copytree(shapes, tmp_path / "shapes")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(shapes), str(data)))
    settings |= {"data": replace(settings["data"], path=str(data)), "epochs": EPOCHS + 1}
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    # Fewer steps an epoch than the run had: six images are three batches of two.
    kept = [image["id"] for image in content["images"][:6]]
    less = content | {"images": content["images"][:6]}
    less |= {"annotations": [one for one in content["annotations"] if one["image_id"] in kept]}
    file.write_text(json.dumps(less))
    with pytest.raises(InputError, match=r"training images: 2 removed \(.*\)\. Put them back, or go on with these by"):
        train(TrainConfig(**settings))
    train(TrainConfig(**settings, accept_changed_data=True))
    assert "the data are not those that the run began with: training images: 2 removed" in caplog.text
    train(TrainConfig(**settings))  # from now on these are the run's

    content["categories"][0]["name"] = "disc"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the classes are not those .* learns: class 'circle' is now 'disc'\. Put"):
        train(TrainConfig(**settings, accept_changed_data=True))


def test_images_that_a_run_holds_back_stay_held_back(
    shapes: Path, short_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also where images were added, which by themselves would be chosen in their place: nothing that was validated on
    is trained on."""
    data = shutil.copytree(shapes, tmp_path / "shapes")
    (data / "annotations" / "instances_val.json").unlink()
    source = DataConfig(str(data), image_size=64, num_workers=0, val_fraction=0.25)
    settings = short_run | {"data": source, "batch_size": 2, "epochs": 1, "output": str(tmp_path / "run")}
    result = train(TrainConfig(**settings))
    held_back = json.loads((tmp_path / "run" / "held_back.json").read_text())
    assert len(held_back) == 2
    rows = (tmp_path / "run" / "val.csv").read_text().splitlines()
    assert len(rows) == 2, "it validates on them"

    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for number in range(12):
        shutil.copy(data / "train" / "000000.jpg", data / "train" / f"new{number}.jpg")
        content["images"].append(content["images"][0] | {"id": 1000 + number, "file_name": f"new{number}.jpg"})
    file.write_text(json.dumps(content))
    _, by_itself = load_splits(source)
    assert set(image_names(by_itself, data)) != set(held_back)
    more = settings | {"resume": "last", "epochs": 2, "accept_changed_data": True}
    prepared = prepare(TrainConfig(**more))
    assert image_names(prepared.val_set, data) == held_back
    assert len(prepared.train_set.images) == 8 + 12 - 2

    checkpoint = str(tmp_path / "run" / "best.pth")
    metrics = evaluate_checkpoint(checkpoint, DataSource(str(shapes), val_fraction=0.25))
    assert metrics.num_images == 2
    assert "held back" not in capsys.readouterr().out
    evaluate_checkpoint(checkpoint, DataSource(str(data)))
    assert "18 of the 20 images are none of those that the run of" in capsys.readouterr().out
    assert result.data_options == ["--data.val_fraction", "0.25"]

    content["images"] = [entry for entry in content["images"] if entry["file_name"] != Path(held_back[0]).name]
    file.write_text(json.dumps(content))
    prepared = prepare(TrainConfig(**more))
    assert image_names(prepared.val_set, data) == held_back[1:]
    training._write_data(prepared)
    assert json.loads((tmp_path / "run" / "held_back.json").read_text()) == held_back, "one that is gone may come back"


# --- full disks


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_best_checkpoint_that_found_no_room_comes_when_there_is(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights of its epoch: later ones are not better, since nothing learns; batch norms still move."""
    run = tmp_path / "run"
    settings = short_run | {"optim": OptimConfig(lr=0.0, weight_decay=0.0), "epochs": 3, "output": str(run)}
    original = callbacks.write_file

    def full(path: Path, *arguments: Any) -> None:
        no_room() if path.name == "best.pth" else original(path, *arguments)

    monkeypatch.setattr(callbacks, "write_file", full)
    first = SaveState.on_train_epoch_end
    weights: list[dict[str, torch.Tensor]] = []

    def interrupted(self: SaveState, trainer: Any, module: Any) -> None:
        first(self, trainer, module)
        weights.append(load_checkpoint(run / "last.pth").model)
        if len(weights) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(SaveState, "on_train_epoch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings))
    assert not (run / "best.pth").exists()
    monkeypatch.undo()  # the run is gone, and there is room: what is needed is in its state
    train(TrainConfig(**settings, resume="last"))
    best = load_checkpoint(run / "best.pth")
    assert best.training["step"] == STEPS
    assert best.model.keys() == weights[0].keys()
    assert all(torch.equal(best.model[name], weights[0][name]) for name in weights[0])
    assert any(not torch.equal(best.model[name], weights[1][name]) for name in weights[1])
    assert (run / "per_class.csv").is_file()


def test_a_best_checkpoint_that_is_gone_is_said_and_another_takes_its_place(
    run_of: Callable[..., tuple[Path, dict]], caplog: pytest.LogCaptureFixture
) -> None:
    run, settings = run_of()
    (run / "best.pth").unlink()
    train(TrainConfig(**settings | {"epochs": EPOCHS + 1}))
    assert "best.pth is not there any more: the best validation from here on takes its place" in caplog.text
    assert load_checkpoint(run / "best.pth").training["step"] == STEPS * (EPOCHS + 1)


def test_the_other_processes_do_not_write_what_the_first_has_to(tmp_path: Path) -> None:
    """All of them load the state, in which an old best checkpoint may wait; a better one may be on disk by now."""
    publish = callbacks.Publish(RunFolder(tmp_path), lambda *_: None)
    publish.load_state_dict({"best_ap": 0.5, "best_metrics": {"per_class": []}, "best_due": {"model": {}}})
    second = type("Trainer", (), {"is_global_zero": False})
    publish.on_train_start(second, None)
    publish.on_train_end(second, None)
    publish.on_exception(second, None, ValueError())
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_does_not_need_the_file_that_it_started_from(
    short_run: dict[str, Any], tiny_run: Any, tmp_path: Path
) -> None:
    weights = Path(shutil.copy(tiny_run.path / "last.pth", tmp_path))
    settings = short_run | {"weights": str(weights), "output": str(tmp_path / "run")}
    train(TrainConfig(**settings | {"epochs": 1}))
    weights.unlink()
    train(TrainConfig(**settings | {"epochs": 2, "resume": "last"}))


def test_a_run_cannot_begin_where_there_is_no_room(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddetr.engine.run.folder.write_text", no_room)
    with pytest.raises(InputError, match=r"--output: .*run cannot be written to \(No space left on device; \d+ MB are"):
        train(TrainConfig(**short_run, output=str(tmp_path / "run")))
    monkeypatch.undo()
    assert list((tmp_path / "run").iterdir()) == [], "the same command works once there is room"


def test_a_service_that_does_not_close_keeps_nobody_waiting(tmp_path: Path) -> None:
    """TensorBoard's writer may wait for half a minute where Ctrl+C came in the midst of a row."""
    closed = threading.Event()

    class Slow:
        def finalize(self, status: str) -> None:
            closed.wait()

    loggers = Loggers(["tensorboard"], RunFolder(tmp_path), {})
    loggers._open["tensorboard"] = Slow()
    loggers.on_exception(None, None, KeyboardInterrupt())  # would never come back
    closed.set()


def test_what_ends_the_thread_of_tensorboard_is_no_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk, a folder that is gone: said as everything else is, with its own reason."""
    run = RunFolder(tmp_path)
    loggers = Loggers(["tensorboard"], run, {})
    hook = threading.excepthook
    loggers.on_train_start(type("Trainer", (), {"global_step": 0}), None)
    writer = loggers._open["tensorboard"].experiment._get_file_writer().event_writer._async_writer
    writer._worker._flush_secs = writer._worker._next_flush_time = 0  # each row at once, not every two minutes
    (tmp_path / "tensorboard").rename(tmp_path / "gone")  # in one move: the thread may be writing into it
    loggers.send("train", 1, {"loss": 1.0})
    with suppress(OSError):  # the writer's, where it has come to the row by now
        writer.flush()
    writer._worker.join()
    loggers.send("train", 2, {"loss": 1.0})
    assert "tensorboard failed and is switched off, the run goes on without it (FileNotFoundError: " in caplog.text
    loggers.on_train_end(None, None)
    assert threading.excepthook == hook


# --- options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": {"backbone": "resnet51"}}, r"unknown backbone 'resnet51'.*did you mean resnet51q or resnet50"),
        ({"model": {"hidden_dim": 30}}, "hidden_dim must be divisible by 4 and by nheads=4, got 30"),
        ({"model": {"nheads": 0}}, "nheads must be at least 1, got 0"),
        ({"model": {"dropout": 1.5}}, r"dropout must lie in \[0, 1\), got 1.5"),
        ({"model": {"enc_layers": -1}}, "enc_layers must be at least 0, got -1"),
        ({"model": {"pretrained_backbone": "nope.pth"}}, "nope.pth"),
        ({"weights": "nope.pth"}, "there is no nope.pth"),
        ({"optim": OptimConfig(freeze=["nothing.*"])}, "nothing"),
        ({"batch_size": 3, "devices": 2}, "batch_size 3 must be divisible by the 2 processes"),
    ],
)
def test_options_are_checked_before_the_data_are_read(
    short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr(preparing, "load_splits", read)
    model = short_run["model"] | wrong.pop("model", {})
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**short_run | {"model": model, "output": "run"} | wrong))


@pytest.mark.parametrize("size", [0, -1, 31, 10_000])
def test_a_size_of_images_that_cannot_be(short_run: dict[str, Any], size: int) -> None:
    with pytest.raises(InputError, match="image_size must lie in 32 to 8192, got"):
        replace(short_run["data"], image_size=size)


def test_data_that_are_not_there_are_said_before_what_trains_is_imported() -> None:
    """Lightning, timm and torchvision take ten seconds."""
    code = """
import sys
from ddetr.cli.main import main
for words in (["train", "--data", "/nonexistent"], ["eval", "--checkpoint", "x", "--data.path=/nonexistent"]):
    assert main(words) == 2
assert not {"lightning", "timm", "torchvision"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ddetr: error: there is no /nonexistent: / has no 'nonexistent'") == 2


def test_a_folder_in_use_is_said_before_the_data_are_read(
    run_of: Callable[..., tuple[Path, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = run_of()
    code = "import sys; from pathlib import Path; from ddetr.engine.run.lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); sys.stdin.read()"
    monkeypatch.setattr(preparing, "load_splits", no_room)
    with subprocess.Popen(
        [sys.executable, "-c", code, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(InputError, match=rf"in use by another run \(process {holder.pid} on "):
            train(TrainConfig(**settings))
        holder.stdin.close()
