"""Which folder a run gets, and what may be resumed."""

import csv
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.run.folder import RunFolder, free_folder
from ddetr.engine.run.lock import LOCK_FILE
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


def write_state(file: Path, step: int, epochs_done: int = 0) -> None:
    position = {"epoch": epochs_done, "batch": 0}
    torch.save({"pytorch-lightning_version": "2.6.6", "global_step": step, "DetectionData": position}, file)


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


def test_a_changed_setting_is_named_and_a_harmless_one_is_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = TrainConfig(DataConfig("x", num_workers=0), optim=OptimConfig(lr=1e-4), epochs=3)
    with run.claimed(is_new=True):
        run.start(config)
    state = tmp_path / "last.ckpt"
    write_state(state, step=1, epochs_done=3)
    run.check_unchanged(config, state)
    run.check_unchanged(replace(config, data=DataConfig("x", num_workers=4), log_every=3), state)
    with pytest.raises(
        InputError, match=r"but optim\.lr was 0\.0001 and is 0\.1, epochs was 3 and is 2: put them back"
    ):
        run.check_unchanged(replace(config, optim=OptimConfig(lr=0.1), epochs=2), state)
    run.check_unchanged(replace(config, epochs=4), state)
    write_state(state, step=1, epochs_done=2)
    with pytest.raises(InputError, match="but epochs was 3 and is 4: put them back"):  # it has not come to its end
        run.check_unchanged(replace(config, epochs=4), state)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"--output: the folder .*file/run cannot be made \(Not a directory\)"
    with pytest.raises(InputError, match=message), RunFolder(tmp_path / "file" / "run").claimed(is_new=True):
        pass


@pytest.mark.parametrize(
    ("content", "what"), [("", "empty"), ("data: [", "broken"), ("- a\n", "no list of"), (b"\xff\xfe\x00", "broken")]
)
def test_settings_that_cannot_be_read_are_said(tmp_path: Path, content: str | bytes, what: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"config.yaml is {what}.*: the settings of the run are not known"):
        RunFolder(tmp_path).settings()


def test_what_a_failed_preflight_leaves_is_free_for_the_next_run() -> None:
    folder = Path("runs/coco")
    folder.mkdir(parents=True)
    (folder / "preflight.json").write_text("{}")
    assert choose() == (folder, None)
    (folder / "notes.txt").write_text("mine")
    assert choose() == (Path("runs/coco-2"), None)


def test_a_run_that_began_meanwhile_is_not_overwritten() -> None:
    """Two commands that start in the same second have both found nothing there."""
    run = RunFolder(make_run("coco"))
    with pytest.raises(InputError, match="already holds a run"), run.claimed(is_new=True):
        pass
    assert not (run.path / LOCK_FILE).exists()
    with run.claimed(is_new=False):
        assert (run.path / LOCK_FILE).exists()
    assert not (run.path / LOCK_FILE).exists()


def test_a_state_that_another_process_has_written_meanwhile_is_not_taken_back() -> None:
    """Two jobs that resume, of which the second had chosen its state before the first went on and ended."""
    folder = make_run("coco")
    run, _ = RunFolder.choose(str(folder), "auto", "coco")
    run.check_nobody_came()
    write_state(folder / "last.ckpt", step=22222)
    with pytest.raises(InputError, match="another process has gone on with the run in .*: start it again"):
        run.check_nobody_came()


def test_the_state_before_is_not_silently_another() -> None:
    folder = make_run("coco")
    write_state(folder / "previous.ckpt", step=0)
    with pytest.raises(InputError, match=r"previous.ckpt is the one before: give the folder, or move last.ckpt away"):
        choose(None, "runs/coco/previous.ckpt")
    (folder / "last.ckpt").unlink()
    assert choose(None, "runs/coco/previous.ckpt") == (folder, folder / "previous.ckpt")


def test_a_start_clears_away_what_a_killed_process_left_half(tmp_path: Path) -> None:
    """But nothing that is somebody else's: a process that lives, a file that is no such one."""
    gone = 2**22 + 1  # above the largest number of a process
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "blackbox" / f".step-000001.{gone}.0123abcd.tmp").mkdir(parents=True)
    left = [folder / f".last.ckpt.{gone}.0123abcd.tmp", folder / "pictures" / f".1.png.{gone}.0123abcd.tmp"]
    stays = [folder / f".report.html.{os.getppid()}.0123abcd.tmp", folder / ".mine.tmp", folder / "last.ckpt"]
    for file in (*left, *stays):
        file.write_text("x")
    run = RunFolder(folder)
    with run.claimed(is_new=True):
        run.start(TrainConfig(DataConfig("x")))
    assert [file for file in left if file.exists()] == []
    assert list((folder / "blackbox").iterdir()) == []
    assert all(file.exists() for file in stays)


def test_a_folder_that_was_moved_away_is_said_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.append_row("train.csv", {"step": 1, "loss": 0.5})
    run.path.rename(tmp_path / "moved")
    run.append_row("train.csv", {"step": 2, "loss": 0.25})
    assert "the folder is not there any more: was it moved?" in caplog.text
    with pytest.raises(InputError, match=r"could not be written: train.csv \(No such file .*\). Put the folder back"):
        run.check_written()
    (tmp_path / "moved").rename(run.path)
    run.append_row("train.csv", {"step": 3, "loss": 0.125})
    assert [row["step"] for row in run.table("train.csv").rows()] == ["1", "2", "3"]
    run.check_written()


def test_names_in_a_table_are_no_formulas(tmp_path: Path) -> None:
    """A spreadsheet would run them."""
    run = RunFolder(tmp_path)
    run.write_csv("per_class.csv", [{"name": name, "AP": -0.5} for name in ("=cmd|' /C calc'!A0", "@a", "-2", "cat")])
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["'=cmd|' /C calc'!A0", "'@a", "-2", "cat"]
    assert {row["AP"] for row in rows} == {"-0.5"}
