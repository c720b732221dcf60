"""A run that is stopped or killed, at any moment, and resumed ends with the bits of the run that nothing disturbed."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import Forks

from ddetr.checkpoint import load_checkpoint

STEPS_AN_EPOCH, EPOCHS = 4, 3
Perform = Callable[..., tuple[list[int], str]]
KILL, TERM, USR1, INT, HUP = (int(getattr(signal, f"SIG{name}")) for name in ("KILL", "TERM", "USR1", "INT", "HUP"))


@pytest.fixture(scope="session")
def perform(forks: Forks) -> Perform:
    """`perform(COMMANDS)`: the exit codes of the commands (see disturbed.py), and what they wrote to standard error."""

    def run(commands: list[list[Any]], seconds: float = 200) -> tuple[list[int], str]:
        program = Path(__file__).with_name("disturbed.py")
        done = forks(program, json.dumps(commands), processes=0, seconds=seconds)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "last.ckpt", weights_only=True)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places where two nested states differ, to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for i, pair in enumerate(zip(one, other)) for found in differences(*pair, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one} != {other}"]


def table(file: Path) -> list[str]:
    """The rows without what no two runs share: times."""
    lines = [line.split(",") for line in file.read_text().splitlines()]
    timed = {i for i, name in enumerate(lines[0]) if name in ("images_per_second", "data_wait")}
    return [",".join(value for i, value in enumerate(line) if i not in timed) for line in lines]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    mine, other = state_of(run), state_of(undisturbed)
    for name in (
        "epoch",
        "global_step",
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "DetectionData",
    ):
        assert differences(mine[name], other[name], name) == []
    assert mine.keys() == other.keys()
    for name in ("last.pth", "best.pth"):
        assert differences(load_checkpoint(run / name).model, load_checkpoint(undisturbed / name).model, name) == []
    for name in ("train.csv", "val.csv"):
        assert table(run / name) == table(undisturbed / name)
    assert (run / "metrics.json").read_text() == (undisturbed / "metrics.json").read_text()
    assert not list(run.glob(".*.tmp")) or run.name.startswith("killed")  # a killed writer cannot clear away


@pytest.fixture(scope="module")
def configuration(shapes: Path, tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that draws random numbers or has a memory: augmentation, dropout, denoising queries, batch
    norms, momenta, a schedule that changes each step."""
    settings = {
        "data": {
            "path": str(shapes),
            "image_size": 64,
            "num_workers": 0,
            "mosaic": 0.5,
            "mixup": 0.5,
            "scale_jitter": 0.5,
            "color_jitter": 0.5,
            "blur": 0.5,
            "augmentation_off_epochs": 1,
        },
        "model": yaml.safe_load((tiny_run.path / "config.yaml").read_text())["model"] | {"dropout": 0.1},
        "auxiliary": {"denoising": 4, "one_to_many": 3},
        "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 3},
        "epochs": EPOCHS,
        "batch_size": 2,
        "device_batch_size": 1,
        "log_every": 1,
        "num_pictures": 0,
    }
    file = tmp_path_factory.mktemp("resume") / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def undisturbed(perform: Perform, configuration: Path) -> Path:
    run = configuration.parent / "undisturbed"
    assert perform([[["train", "--config", str(configuration), "--output", str(run)], None]])[0] == [0]
    assert state_of(run)["global_step"] == STEPS_AN_EPOCH * EPOCHS
    return run


def start(configuration: Path, run: Path, *options: str) -> list[str]:
    return ["train", "--config", str(configuration), "--output", str(run), *options]


EACH_STEP, WORKERS = ["--checkpoint_every", "1"], ["--data.num_workers", "2"]


@pytest.mark.parametrize(
    ("name", "options", "disturbances"),
    [
        # In the midst of an epoch, with a save every step: the second process starts at another step than an epoch's
        # first.
        ("killed-in-epochs", EACH_STEP, [["at_step", 2, KILL], ["at_step", 7, KILL], ["at_step", 12, KILL]]),
        ("killed-in-validation", EACH_STEP, [["in_validation", 0, KILL], ["in_validation", 2, KILL]]),
        ("killed-writing", EACH_STEP, [["writing_state", 2], ["between_renamings", 3], ["writing_state", 1]]),
        # The state is that of an epoch's end: processes that load images begin before the epoch has its number.
        ("killed-with-loaders", WORKERS, [["at_step", STEPS_AN_EPOCH + 1, KILL], ["at_step", 10, KILL]]),
    ],
)
def test_killed_runs_resume_exactly(
    perform: Perform, configuration: Path, undisturbed: Path, name: str, options: list[str], disturbances: list
) -> None:
    run = undisturbed.parent / name
    command = start(configuration, run, *options)
    commands = [[command + ["--resume"] * (i > 0), one] for i, one in enumerate([*disturbances, None])]
    assert perform(commands)[0] == [*[-KILL] * len(disturbances), 0]
    assert_same_run(run, undisturbed)


# All that a run may keep beside weights and optimiser, and all that changes the order in which things are drawn.
EVERYTHING = ["--precision", "fp16", "--deterministic", "--optim.ema_decay", "0.9", "--data.buckets"]
EVERYTHING += ["--activation_checkpointing", *WORKERS]


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--compile", "true"], marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_a_run_in_half_precision_with_all_that_it_keeps(
    perform: Perform, undisturbed: Path, configuration: Path, more: list
) -> None:
    """The gradient scaler's state, averaged weights, and only deterministic algorithms; from the end of an epoch."""
    whole, run = (undisturbed.parent / f"{name}-{len(more)}" for name in ("half", "killed-half"))
    command = start(configuration, run, *EVERYTHING, *more)
    codes, _ = perform(
        [
            [start(configuration, whole, *EVERYTHING, *more), None],
            [command, ["at_step", STEPS_AN_EPOCH + 1, KILL]],
            [[*command, "--resume"], None],
        ],
        seconds=1400 if more else 200,
    )
    assert codes == [0, -KILL, 0]
    assert differences(state_of(run)["weight_average"], state_of(whole)["weight_average"]) == []
    assert state_of(run)["MixedPrecision"]["scale"] > 1
    assert differences(state_of(run)["MixedPrecision"], state_of(whole)["MixedPrecision"]) == []
    assert_same_run(run, whole)
    assert table(whole / "train.csv") != table(undisturbed / "train.csv")


def test_stop_signals_save_the_step_and_are_answered_by_their_code(
    perform: Perform, configuration: Path, undisturbed: Path
) -> None:
    """No save is due by itself at steps 1, 2, 5 and 6: what is resumed was saved because of the signal. It goes to the
    processes that load images too, as a terminal and a scheduler send it."""
    run = undisturbed.parent / "stopped"
    command = start(configuration, run, *WORKERS)
    steps = [(1, INT), (2, TERM), (5, HUP), (6, USR1)]
    disturbances: list[list[Any]] = [["at_step", step, signum, 0, True] for step, signum in steps]
    disturbances += [["in_validation", 1, TERM], ["at_step", 12, INT, 0, True]]
    commands = [[command + ["--resume"] * (i > 0), one] for i, one in enumerate(disturbances)]
    codes, said = perform(commands)
    assert codes == [128 + signum for _, _, signum, *_ in disturbances]
    # The last step of an epoch is done again, with its validation.
    for name, step, saved in (
        *(("INT", 1, 1), ("TERM", 2, 2), ("HUP", 5, 5), ("USR1", 6, 6), ("TERM", 8, 7), ("INT", 12, 11)),
    ):
        message = f"stopped by SIG{name} at step {step}: the state of step {saved} is saved, and the same command with"
        assert message in said, message
    assert state_of(run)["global_step"] == 11
    assert perform([[[*command, "--resume"], None]])[0] == [0]
    assert_same_run(run, undisturbed)


def test_a_resumed_run_does_not_load_what_it_has_seen(
    perform: Perform, configuration: Path, tmp_path: Path, shapes: Path
) -> None:
    """Nor does it train on it again: the steps after the kill are those that were left."""
    run = tmp_path / "run"
    command = start(configuration, run, "--checkpoint_every", "1")
    assert perform([[command, ["at_step", 3, KILL]]])[0] == [-KILL]
    assert state_of(run)["global_step"] == 2
    assert state_of(run)["DetectionData"] == {"epoch": 0, "batch": 2}


def test_who_stops_a_run_by_hand_does_not_wait_long(perform: Perform, configuration: Path, tmp_path: Path) -> None:
    """A step that takes longer than a person's patience is given up; a second Ctrl+C ends at once."""
    command = start(configuration, tmp_path / "run", "--checkpoint_every", "1")
    commands = [[command, ["endless_step", 3]], [[*command, "--resume"], ["interrupted_twice", 4]]]
    codes, said = perform(commands, seconds=150)
    assert codes == [128 + INT] * 2
    assert "stopped by SIGINT at step 2: the state of step 2 is saved, and the same command with --resume" in said
    assert "ddetr: interrupted; the same command with --resume goes on from the last saved state" in said
    assert state_of(tmp_path / "run")["global_step"] == 3


def test_a_damaged_state_costs_no_more_than_the_steps_since_the_one_before(
    perform: Perform, configuration: Path, undisturbed: Path
) -> None:
    run = undisturbed.parent / "damaged"
    command = start(configuration, run, "--checkpoint_every", "1")
    assert perform([[command, ["at_step", 7, KILL]]])[0] == [-KILL]
    content = bytearray((run / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "last.ckpt").write_bytes(content)
    codes, said = perform([[[*command, "--resume"], None]])
    assert codes == [0]
    assert "last.ckpt is damaged: the checksum of" in " ".join(said.split())
    assert_same_run(run, undisturbed)
    assert (run / "damaged.ckpt").read_bytes() == content


def test_a_full_disk_is_reported_and_the_run_goes_on(
    perform: Perform, configuration: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Files of the run may not grow beyond a few kilobytes: tables fit, states and weights do not."""
    run = tmp_path / "run"
    whole = start(configuration, run)
    assert perform([[whole, ["at_step", 7, TERM]]])[0] == [128 + TERM]
    before = (run / "last.ckpt").read_bytes()
    codes, said = perform([[[*whole, "--resume"], ["full_disk", 20_000]]])
    said = " ".join(said.split())  # where lines are broken depends on how long the run's path is
    assert codes == [2]  # all that could be done was done, but not everything is on disk
    assert "last.ckpt could not be written (File too large; " in said
    assert "what was there before is intact and the run goes on" in said
    assert said.count("last.ckpt could not be written") == 1, "it is said once"
    assert "the run has come to its end, but in" in said
    assert all(f"{name} (File too large)" in said.partition("come to its end")[2] for name in ("last.ckpt", "last.pth"))
    assert (run / "last.ckpt").read_bytes() == before
    load_checkpoint(run / "best.pth")
    assert perform([[[*whole, "--resume"], None]])[0] == [0]
    assert_same_run(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_twenty_random_moments_resumes_exactly(
    perform: Perform, configuration: Path, undisturbed: Path, workers: int
) -> None:
    """Reading, writing, training, validating, starting: the moments are of any kind."""
    draw = random.Random(workers)
    run = undisturbed.parent / f"killed-at-random-{workers}"
    command = [*start(configuration, run, "--checkpoint_every", "1", "--data.num_workers", str(workers)), "--resume"]
    assert perform([[command[:-1], ["at_step", 2, KILL]]])[0] == [-KILL]  # there is a run to resume
    commands = []
    for _ in range(20):  # half of them without a save every step, so that they begin at an epoch's beginning
        options = command if draw.random() < 0.5 else [word for word in command if word not in EACH_STEP]
        commands.append([options, ["seconds", draw.uniform(0.3, 6.0)]])
    codes, _ = perform([*commands, [command, None]], seconds=2900)
    assert set(codes) <= {-KILL, 0}
    assert_same_run(run, undisturbed)
