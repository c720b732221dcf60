"""Which folder a run gets, and what may be resumed."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.run_folder import RunFolder, check_training_state, free_folder
from ddetr.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no trace of another run in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("DDETR_RUN", "LOCAL_RANK", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "x")  # so that the original state comes back, whatever the test sets
        monkeypatch.delenv(name)
    return tmp_path


def make_run(name: str, *, checkpoint: bool = True, seconds_ago: float = 0) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    if checkpoint:
        write_state(folder / "last.ckpt", step=1)
    for file in folder.iterdir():
        then = time.time() - seconds_ago
        os.utime(file, (then, then))
    return folder


def write_state(file: Path, step: int) -> None:
    torch.save({"pytorch-lightning_version": "2.6.6", "global_step": step}, file)


def choose(output: str | None = None, resume: str | None = None, name: str = "coco") -> tuple[Path, Path | None]:
    run, file = RunFolder.choose(output, resume, name)
    return run.path, file


def test_the_default_folder_is_numbered() -> None:
    assert choose() == (Path("runs/coco"), None)
    make_run("coco")
    assert choose() == (Path("runs/coco-2"), None)
    make_run("coco-2")
    assert choose() == (Path("runs/coco-3"), None)
    assert free_folder(Path("elsewhere"), "x") == Path("elsewhere/x")


def test_a_second_run_in_one_process_gets_its_own_folder() -> None:
    assert choose("a")[0] == Path("a")
    assert choose("b")[0] == Path("b")
    assert choose()[0] == Path("runs/coco")


def test_the_processes_that_lightning_starts_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("coco")
    assert choose()[0] == Path("runs/coco-2")
    make_run("coco-2", checkpoint=False)  # the first process has begun before the second one asks
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose() == (Path("runs/coco-2"), None)


def test_under_torchrun_the_folder_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("DDETR_RUN", "of/another/run")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match="give --output FOLDER"):
            choose()
        assert choose("out") == (Path("out"), None)
    make_run("begun", checkpoint=False)
    assert choose("runs/begun") == (Path("runs/begun"), None)  # by the first process, a moment ago


def test_nothing_is_overwritten() -> None:
    folder = make_run("coco")
    with pytest.raises(InputError, match=r"runs/coco already holds a run: add --resume .* or choose another --output"):
        choose(str(folder))


def test_resume_takes_the_newest_run_of_the_name() -> None:
    make_run("coco", seconds_ago=100)
    make_run("coco-2", seconds_ago=50)
    make_run("coco-3", seconds_ago=70)
    make_run("coco_tiny")  # of another data set
    make_run("coco-2-old")
    for resume in ("last", "auto"):
        assert choose(resume=resume) == (Path("runs/coco-2"), Path("runs/coco-2/last.ckpt"))


@pytest.mark.parametrize("given", ["runs/coco", "runs/coco/last.ckpt"])
def test_resume_takes_a_folder_or_its_file(given: str) -> None:
    folder = make_run("coco")
    for output in (None, "runs/coco"):
        assert choose(output, given) == (folder, folder / "last.ckpt")
    for resume in ("last", "auto"):
        assert choose("runs/coco", resume) == (folder, folder / "last.ckpt")


@pytest.mark.parametrize("output", [None, "runs/coco", "empty"])
def test_resume_auto_begins_where_there_is_nothing_to_go_on_with(
    output: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """What a job wants that is started by the same command each time."""
    Path("empty").mkdir()
    with caplog.at_level("INFO", "ddetr"):
        assert choose(output, "auto") == (Path(output or "runs/coco"), None)
    assert f"--resume auto: {output or 'runs/coco'} holds no run yet, so a new one begins" in caplog.text


def test_a_run_stopped_in_its_first_epoch_is_started_again() -> None:
    folder = make_run("coco", checkpoint=False)
    for resume in ("last", "auto", "runs/coco"):
        assert choose(resume=resume) == (folder, None)


@pytest.mark.parametrize(
    ("output", "resume", "message"),
    [
        (None, "last", "there is no run runs/coco to continue"),
        ("empty", "last", "empty holds no run"),
        (None, "nowhere", "expected a run folder or its last.ckpt, but there is no nowhere"),
        (None, "empty", "empty holds no run"),
        (None, "some.txt", "some.txt is no training state"),
        ("other", "runs/other-name", "continues the run in runs/other-name: leave --output out"),
    ],
)
def test_what_cannot_be_resumed_is_said(output: str | None, resume: str, message: str) -> None:
    Path("empty").mkdir()
    Path("some.txt").write_text("words")
    make_run("other-name")
    with pytest.raises(InputError, match=message):
        choose(output, resume)


def test_a_training_state_is_told_from_weights(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, file)
    check_training_state(file)
    torch.save({"model": {"x": torch.zeros(1)}}, file)
    with pytest.raises(InputError, match="holds weights, not the state of a run: start from them with --weights"):
        check_training_state(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="is no training state, or a damaged one"):
        check_training_state(file)


def test_a_changed_setting_is_named_and_a_harmless_one_is_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = TrainConfig(DataConfig("x", num_workers=0), optim=OptimConfig(lr=1e-4), epochs=3)
    run.start(config)
    run.check_unchanged(config)
    run.check_unchanged(replace(config, data=DataConfig("x", num_workers=4), log_every=3))
    with pytest.raises(
        InputError, match=r"but optim\.lr was 0\.0001 and is 0\.1, epochs was 3 and is 4: put them back"
    ):
        run.check_unchanged(replace(config, optim=OptimConfig(lr=0.1), epochs=4))


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output: the folder .*file/run cannot be made \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").start(TrainConfig(DataConfig("x")))


def test_rows_after_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_csv("train.csv", {"step": step, "loss": step / 2})
    run.drop_rows_after("train.csv", 2)
    run.append_csv("train.csv", {"step": 3, "loss": 7.0})
    assert (tmp_path / "train.csv").read_text() == "step,loss\n1,0.5\n2,1.0\n3,7.0\n"
    run.drop_rows_after("train.csv", 0)
    run.append_csv("train.csv", {"step": 1, "loss": 0.5})
    assert (tmp_path / "train.csv").read_text() == "step,loss\n1,0.5\n"


def test_a_damaged_state_gives_way_to_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    folder = make_run("coco")
    write_state(folder / "previous.ckpt", step=0)
    whole = (folder / "last.ckpt").read_bytes()
    assert choose("runs/coco", "auto") == (folder, folder / "last.ckpt")
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert choose("runs/coco", "auto") == (folder, folder / "previous.ckpt")
    assert "last.ckpt is no training state, or a damaged one" in caplog.text
    (folder / "last.ckpt").unlink()
    assert choose("runs/coco", "auto") == (folder, folder / "previous.ckpt")
    (folder / "previous.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match="previous.ckpt is no training state, or a damaged one"):
        choose("runs/coco", "auto")


def test_half_a_row_is_left_out_and_cleared_away(tmp_path: Path) -> None:
    """What a kill in the midst of writing leaves, with the row after it not glued on."""
    run = RunFolder(tmp_path)
    for step in 1, 2, 3:
        run.append_csv("train.csv", {"step": step, "loss": 0.5, "lr": 1})
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text[: text.rindex("3,0.5") + 3])
    assert [row["step"] for row in run.read_csv("train.csv")] == ["1", "2"]
    run.drop_rows_after("train.csv", 5)
    run.append_csv("train.csv", {"step": 3, "loss": 0.25, "lr": 1})
    assert [row["loss"] for row in run.read_csv("train.csv")] == ["0.5", "0.5", "0.25"]


def test_names_in_a_table_are_no_formulas(tmp_path: Path) -> None:
    """A spreadsheet would run them."""
    run = RunFolder(tmp_path)
    run.write_csv("per_class.csv", [{"name": name, "AP": -0.5} for name in ("=cmd|' /C calc'!A0", "@a", "-2", "cat")])
    assert [row["name"] for row in run.read_csv("per_class.csv")] == ["'=cmd|' /C calc'!A0", "'@a", "-2", "cat"]
    assert {row["AP"] for row in run.read_csv("per_class.csv")} == {"-0.5"}
