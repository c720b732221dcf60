"""The command line: what each command does, and that every mistake gets one clear sentence and exit code 2."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from ddetr.cli import main as cli
from ddetr.datasets.load import FORMATS

MODEL = [
    *("--model.backbone", "test_resnet", "--model.pretrained_backbone", "false", "--model.hidden_dim", "32"),
    *("--model.nheads", "4", "--model.enc_layers", "1", "--model.dec_layers", "2", "--model.dim_feedforward", "64"),
    *("--model.num-queries", "12", "--model.num_feature_levels", "2", "--model.two_stage", "false"),
]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ddetr(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(ddetr: Callable[..., Outcome]) -> Callable[..., str]:
    """The one sentence with which a command line is refused."""

    def run(*arguments: Any) -> str:
        outcome = ddetr(*arguments)
        assert outcome.code == 2, outcome
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("ddetr: error: ")
        return lines[0].removeprefix("ddetr: error: ")

    return run


# --- help, version, commands


def test_the_overview_is_light_and_names_every_command() -> None:
    code = """
import sys
from ddetr.cli.main import main
assert main(["--help"]) == 0
heavy = {"torch", "torchvision", "timm", "lightning", "numpy", "matplotlib", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)


def test_help_and_mistakes_do_not_wait_for_what_only_training_needs() -> None:
    """Lightning, timm and torchvision take seconds to import; PyTorch, whose modules the signatures come from, one."""
    code = """
import sys
from ddetr.cli.main import main
for command in ("train", "eval", "predict", "demo"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
assert main(["train", "--data", "x", "--epoch", "3"]) == 2
heavy = {"torchvision", "timm", "lightning", "matplotlib", "scipy", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model.two_stage" in done.stdout


def test_the_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "ddetr", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ddetr {cli.__version__}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(ddetr: Callable[..., Outcome], capsys: pytest.CaptureFixture, name: str) -> None:
    with pytest.raises(SystemExit) as done:
        ddetr(*name.split(), "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: ddetr {name} ")
    assert cli.COMMANDS[name].__doc__ in text
    assert "==SUPPRESS==" not in text
    assert "Path to a configuration file" not in text
    options = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    undescribed = [option for option in options if f"{option} " not in text and f"{option}\n" not in text]
    assert not undescribed


def test_help_tells_defaults_and_choices(ddetr: Callable[..., Outcome], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ddetr("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--data PATH the same as --data.path PATH" in text
    assert "--optim.lr_drop LR_DROP Epochs before the rates drop" in text
    assert "default: 0.0002" in text
    assert "--model.two_stage {true,false} queries start from encoder proposals" in text
    assert "num_classes" not in text


ALL = ", ".join(cli.COMMANDS)
DATA = ", ".join(name.split()[1] for name in cli.COMMANDS if name.startswith("data "))
BENCHES = ", ".join(name.split()[1] for name in cli.COMMANDS if name.startswith("bench "))


@pytest.mark.parametrize("group", ["data", "weights", "bench"])
def test_help_of_a_group_lists_its_commands(ddetr: Callable[..., Outcome], group: str) -> None:
    code, out, _ = ddetr(group, "--help")
    commands = [name for name in cli.COMMANDS if name.startswith(f"{group} ")]
    assert code == 0
    assert [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ")] == commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], f"no command 'tran' (did you mean train?): expected one of {ALL}"),
        (["data"], f"ddetr data: expected a command, one of: {DATA}"),
        (["bench"], f"ddetr bench: expected a command, one of: {BENCHES}"),
        (["bench", "operator"], f"ddetr bench: expected a command, one of: {BENCHES}"),
        (["--epochs"], f"no command '--epochs': expected one of {ALL}"),
    ],
)
def test_unknown_commands(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert refused(*arguments) == message


# --- options


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "ddetr train needs --data PATH; ddetr train --help lists all options"),
        ("train --data", "--data: expected a value, got none"),
        ("train --data x --epochs", "--epochs: expected a value, got none"),
        ("train --data x stray", "unexpected argument 'stray'; ddetr train --help lists all options"),
        ("train --data x --epoch 3", "unknown option --epoch (did you mean --epochs?)"),
        ("train --data x --batch 3", "unknown option --batch (did you mean --batch_size?)"),
        ("train --data x --lr 3", "unknown option --lr (did you mean --optim.lr?)"),
        ("train --data x --model.querys 3", "unknown option --model.querys (did you mean --model.num_queries?)"),
        ("train --data x --datta y", "unknown option --datta (did you mean --data?)"),
        (
            "train --data x --model.num_classes 3",
            "unknown option --model.num_classes (the number of classes comes from the data set)",
        ),
        ("train --data x --zzz 3", "unknown option --zzz"),
        ("train --data x --epochs many", "--epochs: expected a whole number, got 'many'"),
        ("train --data x --epochs 1.5", "--epochs: expected a whole number, got '1.5'"),
        ("train --data x --epochs=1.5", "--epochs: expected a whole number, got '1.5'"),
        ("train --data x --optim.lr fast", "--optim.lr: expected a number, got 'fast'"),
        ("train --data x --loggers", "--loggers: expected a value, got none"),
        (
            "train --data x --loggers wanb",
            "--loggers: expected any of tensorboard, wandb, mlflow or null, got 'wanb' (did you mean wandb?)",
        ),
        (
            "train --data x --optim.schedule cosin",
            "--optim.schedule: expected one of step, cosine, got 'cosin' (did you mean cosine?)",
        ),
        (
            "train --data x --data.format vok",
            f"--data.format: expected one of auto, {', '.join(FORMATS)}, got 'vok' (did you mean voc?)",
        ),
        ("train --data x --devices two", "--devices: expected a whole number or null, got 'two'"),
        (
            "train --data x --model.freeze_backbone x",
            "--model.freeze_backbone: expected one of none, norm, stem, all or null, got 'x'",
        ),
        ("train --data x --data.strict=maybe", "--data.strict: expected true or false, got 'maybe'"),
        ("train --data x --optim.lr -1", "lr must be at least 0, got -1.0"),
        ("train --data x --optim.lr_drop 0", "lr_drop must be at least 1, got 0"),
        ("eval", "ddetr eval needs --data PATH; ddetr eval --help lists all options"),
        (
            "predict --checkpoint x",
            "ddetr predict needs IMAGES and --output OUTPUT; ddetr predict --help lists all options",
        ),
        ("predict --checkpoint x --output y z --treshold 1", "unknown option --treshold (did you mean --threshold?)"),
        ("predict --checkpoint x --output y z --threshold high", "--threshold: expected a number or null, got 'high'"),
        ("data audit", "ddetr data audit needs PATH; ddetr data audit --help lists all options"),
        ("data audit x --decod", "unknown option --decod (did you mean --decode?)"),
    ],
)
def test_wrong_options(refused: Callable[..., str], line: str, message: str) -> None:
    assert refused(*line.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch' (did you mean epochs?)"),
        ("model:\n  querys: 3", "unknown key 'model.querys' (did you mean model.num_queries?)"),
        ("model:\n  num_classes: 3", "unknown key 'model.num_classes' (the number of classes comes from the data set)"),
        ("modle:\n  two_stage: true", "unknown key 'modle'"),
        ("3: 4", "unknown key '3'"),
        ("epochs: many", "epochs: expected a whole number, got 'many'"),
        ("epochs: [1]", "epochs: expected a whole number, got '[1]'"),
        ("optim:\n  lr: fast", "optim.lr: expected a number, got 'fast'"),
        ("data:\n  augmentation: heavy", "data.augmentation: expected one of official, plain, none, got 'heavy'"),
        ("model: 3", "model: expected a group of options, such as `hidden_dim: ...`, got 3"),
        ("model:", "model: expected a group of options, such as `hidden_dim: ...`, got nothing"),
        ("data: some/path", "data: expected a group of options, such as `path: ...`, got 'some/path'"),
        ("- a\n- b", "expected options with values, such as `epochs: 50`, got a list"),
        ("", "expected options with values, such as `epochs: 50`, got nothing"),
        ("model: {a: [1,\nepochs: 3", "broken YAML at line "),
        ("a: b: c", "broken YAML at line 1, column 5: mapping values are not allowed here"),
    ],
)
def test_wrong_yaml(refused: Callable[..., str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    for option in (["--config", "wrong.yaml"], ["--config=wrong.yaml"]):
        assert refused("train", "--data", "x", *option).startswith(f"wrong.yaml: {message}")


def test_yaml_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("epochs: 3")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    assert refused("train", "--data", "x", "--config", "smal.yaml") == (
        "--config smal.yaml: there is no such file (did you mean small.yaml?)"
    )
    cannot = "expected a YAML file, but it cannot be read"
    assert (
        refused("train", "--data", "x", "--config", "binary.yaml") == f"--config binary.yaml: {cannot} (it is no text)"
    )
    assert refused("train", "--data", "x", "--config", "folder").startswith(f"--config folder: {cannot} (")
    os.mkfifo(tmp_path / "pipe")
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 40}]\n" for i in range(9))
    (tmp_path / "laughs.yaml").write_text(laughs)
    for option in ("--config", "--optim"):  # jsonargparse takes a file for a group too
        said = refused("train", "--data", "x", option, "pipe")
        assert said == f"{option} pipe: {cannot} (it is a named pipe, not a file)"
        assert "more than 250,000 values" in refused("train", "--data", "x", option, "laughs.yaml")


def settings_of(capsys: pytest.CaptureFixture, *arguments: Any) -> dict[str, Any]:
    """What `ddetr train ARGUMENTS --print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *map(str, arguments), "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_spellings(capsys: pytest.CaptureFixture) -> None:
    plain = settings_of(
        capsys, "--data.path", "x", "--batch_size", "4", "--data.format", "voc", "--data.strict", "true"
    )
    for arguments in (
        ["--data", "x", "--batch-size", "4", "--data.format", "voc", "--data.strict"],
        ["--data=x", "--batch-size=4", "--data.strict", "--data.format=voc"],
        ["--data.strict", "true", "--data", "x", "--data.format", "voc", "--batch_size=4"],
    ):
        assert settings_of(capsys, *arguments) == plain
    assert (plain["data"]["path"], plain["data"]["format"], plain["batch_size"]) == ("x", "voc", 4)
    assert plain["data"]["strict"] is True
    assert plain["resume"] is None
    for arguments in (["--resume", "auto"], ["--resume=auto"]):
        assert settings_of(capsys, "--data", "x", *arguments)["resume"] == "auto"
    assert settings_of(capsys, "--data", "x", "--resume")["resume"] == "last"
    assert settings_of(capsys, "--resume", "--data", "x")["resume"] == "last"
    assert settings_of(capsys, "--resume", "runs/a", "--data", "x")["resume"] == "runs/a"


def test_lists_can_be_written_with_commas(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def freeze(*arguments: Any) -> list[str]:
        return settings_of(capsys, "--data", "x", *arguments)["optim"]["freeze"]

    assert freeze() == []
    both = ["backbone.*", "*.norm1.*"]
    for arguments in (
        ["--optim.freeze", "backbone.*,*.norm1.*"],
        ["--optim.freeze=backbone.*, *.norm1.*"],
        ["--optim.freeze", '["backbone.*", "*.norm1.*"]'],
    ):
        assert freeze(*arguments) == both
    (tmp_path / "frozen.yaml").write_text("optim:\n  freeze: ['backbone.*', '*.norm1.*']\n")
    assert freeze("--config", tmp_path / "frozen.yaml") == both
    assert freeze("--config", tmp_path / "frozen.yaml", "--optim.freeze", "[]") == []
    for arguments, expected in ((["wandb,mlflow"], ["wandb", "mlflow"]), (["[]"], []), (["null"], None)):
        assert settings_of(capsys, "--data", "x", "--loggers", *arguments)["loggers"] == expected


def test_the_printed_config_can_be_fed_back_and_overridden(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    first = settings_of(capsys, "--data", "x", *MODEL, "--optim.lr", "2e-4", "--precision", "bf16")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    config = ["--config", tmp_path / "config.yaml"]
    assert settings_of(capsys, *config) == first
    assert settings_of(capsys, *config, "--optim.lr", "1")["optim"] == first["optim"] | {"lr": 1.0}
    (tmp_path / "more.yaml").write_text("epochs: 7\noptim: {lr: 3e-5}\n")
    both = settings_of(capsys, *config, "--config", tmp_path / "more.yaml", "--epochs", "8")
    assert both == first | {"epochs": 8, "optim": first["optim"] | {"lr": 3e-5}}


def test_the_config_of_a_run_can_be_fed_back(capsys: pytest.CaptureFixture, tiny_run: Any) -> None:
    file = tiny_run.path / "config.yaml"
    written = yaml.safe_load(file.read_text())
    read = settings_of(capsys, "--config", file)
    assert {name: read[name] for name in written} == written


# --- paths


def test_wrong_paths(refused: Callable[..., str], tmp_path: Path, shapes: Path, tiny_run: Any) -> None:
    best = tiny_run.path / "best.pth"
    (tmp_path / "empty").mkdir()
    missing = f"there is no nowhere: {tmp_path} has no 'nowhere'"
    for command in (["train", "--data"], ["data", "audit"], ["eval", "--checkpoint", best, "--data"]):
        assert refused(*command, "nowhere") == missing
        assert refused(*command, "empty").startswith("empty is no data set that is known: expected COCO")
    assert refused("train", "--data", shapes, "--data.format", "voc").endswith("holds no voc data set")
    assert refused("eval", "--checkpoint", best, "--data", shapes, "--split", "vall").endswith(
        'has no split "vall"; it has: train, val (did you mean val?)'
    )
    assert (
        refused("predict", "--checkpoint", best, "--output", "out", "nowhere.jpg")
        == "There is no file or folder nowhere.jpg."
    )
    assert refused("predict", "--checkpoint", best, "--output", "out", "*.jpg") == "Nothing matches *.jpg."
    assert refused("predict", "--checkpoint", best, "--output", "out", "empty").startswith(
        "There are no images in empty"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_outputs_that_cannot_be_written(
    refused: Callable[..., str], tmp_path: Path, shapes: Path, tiny_run: Any, command: str
) -> None:
    (tmp_path / "file").write_text("")
    what = ["--data", shapes] if command == "eval" else [shapes / "val"]
    message = refused(command, "--checkpoint", tiny_run.path / "best.pth", "--output", "file/out", *what)
    assert "file/out" in message
    assert "Not a directory" in message


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was run"),)


def test_files_that_are_no_checkpoints(
    refused: Callable[..., str], tmp_path: Path, shapes: Path, tiny_run: Any
) -> None:
    best = (tiny_run.path / "best.pth").read_bytes()
    files = {
        "text.pth": (b"just words\n", "expected a file of weights"),
        "cut.pth": (best[: len(best) // 2], "damaged or cut short"),
        "empty.pth": (b"", "expected a file of weights"),
        "pickle.pth": (pickle.dumps(Malicious()), "expected a file of weights"),
        "last.ckpt": ((tiny_run.path / "last.ckpt").read_bytes(), "the state of a run, which names neither"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        lines = [
            ["eval", "--checkpoint", name, "--data", shapes],
            ["predict", "--checkpoint", name, "--output", "out", shapes / "val"],
        ]
        for line in lines:
            said = refused(*line)
            assert said.startswith(f"{name}: ")
            assert message in said
    torch.save({"model": Malicious()}, "code.pth")
    said = refused("eval", "--checkpoint", "code.pth", "--data", shapes)
    assert said.startswith("code.pth: expected tensors and plain values only, but the file wants to run")
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": {"x": torch.zeros(3)}}, weights)
    assert "expected weights of Deformable DETR" in refused("eval", "--checkpoint", weights, "--data", shapes)
    assert "there is none" in refused("eval", "--checkpoint", "nowhere.pth", "--data", shapes)
    assert "got a folder" in refused("eval", "--checkpoint", tmp_path, "--data", shapes)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("text.pth", "expected a file of weights"), ("other.ckpt", "expected weights of Deformable")]
)
def test_weights_that_are_no_checkpoint(
    ddetr: Callable[..., Outcome], tmp_path: Path, shapes: Path, name: str, message: str
) -> None:
    (tmp_path / "text.pth").write_text("just words")
    state = {"pytorch-lightning_version": "2.6.6", "state_dict": {"encoder.weight": torch.zeros(3)}}
    torch.save(state, tmp_path / "other.ckpt")
    outcome = ddetr("train", "--data", shapes, "--batch_size", "2", "--weights", name, *MODEL)
    assert outcome.code == 2
    assert outcome.err.startswith(f"ddetr: error: {name}: ")
    assert message in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there(refused: Callable[..., str], shapes: Path, tiny_run: Any) -> None:
    for device in ["gpu", "cuda:99"]:
        said = refused("eval", "--checkpoint", tiny_run.path / "best.pth", "--data", shapes, "--device", device)
        assert said.startswith(f"device {device}: expected auto, cpu, cuda or cuda:N, and PyTorch sees ")


def test_a_failure_of_the_program_keeps_its_traceback(
    ddetr: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, shapes: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ddetr.datasets.splits.load_splits", broken)
    with pytest.raises(ZeroDivisionError):  # Python prints the traceback and exits with 1
        ddetr("data", "audit", shapes)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("step 3 has loss nan"), "step 3 has loss nan"),
        (OSError(28, "No space left on device", "out/a.jpg"), "out/a.jpg: No space left on device"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_run_that_diverges_and_a_full_disk_are_a_sentence(
    ddetr: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, shapes: Path, error: Exception, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ddetr.datasets.splits.load_splits", fail)
    assert ddetr("data", "audit", shapes)[::2] == (1, f"ddetr: error: {said}\n")


def test_interrupted(ddetr: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, shapes: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddetr.datasets.splits.load_splits", interrupted)
    assert ddetr("data", "audit", shapes)[::2] == (130, "ddetr: interrupted\n")


# --- what the commands do


def test_train_says_where_everything_is_and_what_next(
    ddetr: Callable[..., Outcome], shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.yaml").write_text("epochs: 9\nbatch_size: 2\nlog_every: 1\n")
    line = ["train", "--config", "some.yaml", "--data", shapes, "--data.image_size", "64", "--data.num_workers", "0"]
    outcome = ddetr(*line, "--epochs", "1", "--batch-size", "4", "--num-pictures", "1", "--output", "a run", *MODEL)
    assert outcome.code == 0, outcome.err
    for name in (
        "best.pth",
        "metrics.json",
        "per_class.csv",
        "train.csv",
        "val.csv",
        "curves.png",
        "pictures",
        "report.html",
    ):
        assert (tmp_path / "a run" / name).exists()
        assert f"a run/{name}" in outcome.out
    assert "Data audit" in outcome.out
    commands = [line.strip() for line in outcome.out.splitlines() if line.startswith("  ddetr ")]
    assert [command.split()[1] for command in commands] == ["predict", "eval", "train"]
    assert "'a run/best.pth'" in commands[0]
    assert len((tmp_path / "a run" / "train.csv").read_text().splitlines()) == 3

    again = ddetr(*line, "--output", "a run", *MODEL)
    assert again.code == 2
    assert "a run already holds a run" in again.err


def test_eval_measures_what_the_run_measured(
    ddetr: Callable[..., Outcome], shapes: Path, tiny_run: Any, tmp_path: Path
) -> None:
    arguments = ["--checkpoint", tiny_run.path / "last.pth", "--data", shapes, "--split", "train", "--batch_size", "8"]
    outcome = ddetr("eval", *arguments, "--output", "results")
    assert outcome.code == 0, outcome.err
    assert "COCO metrics: 8 images, 24 objects" in outcome.out
    assert tiny_run.metrics.AP > 0.1
    assert json.loads((tmp_path / "results" / "metrics.json").read_text()) == tiny_run.metrics.to_dict()
    results = json.loads((tmp_path / "results" / "predictions.json").read_text())
    assert len(results) == tiny_run.metrics.num_detections
    assert {result["category_id"] for result in results} <= {1, 2, 3}


def test_eval_takes_the_only_split(ddetr: Callable[..., Outcome], shapes: Path, tiny_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "only val"
    shutil.copytree(shapes, folder)
    (folder / "annotations" / "instances_train.json").unlink()
    outcome = ddetr("eval", "--checkpoint", tiny_run.path / "best.pth", "--data", folder)
    assert outcome.code == 0, outcome.err
    assert "COCO metrics: 4 images, 11 objects" in outcome.out


def test_eval_on_other_classes_says_so(ddetr: Callable[..., Outcome], tiny_run: Any, cells: Path) -> None:
    outcome = ddetr("eval", "--checkpoint", tiny_run.path / "best.pth", "--data", cells)
    assert outcome.code == 2
    assert "cells/val has no object of the checkpoint's classes (circle, square, triangle)" in outcome.err


def test_predict_takes_files_folders_and_patterns(
    ddetr: Callable[..., Outcome], shapes: Path, tiny_run: Any, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(shapes / "val", photos)
    (photos / "000003.jpg").write_bytes(b"no image")
    outcome = ddetr(
        *("predict", "--checkpoint", tiny_run.path / "best.pth", "--output", "out", "--threshold", "0.01"),
        *(photos, shapes / "train" / "000005.jpg", str(shapes / "train" / "00000[67].jpg")),
    )
    assert outcome.code == 0, outcome.err
    pictures = sorted(path.name for path in (tmp_path / "out" / "annotated").iterdir())
    assert pictures == [f"00000{i}.jpg" for i in (0, 1, 2, 5, 6, 7)]
    assert "in 6 images" in outcome.out
    assert "not read" in outcome.out
    assert "000003.jpg" in outcome.out
    named = json.loads((tmp_path / "out" / "predictions_named.json").read_text())
    assert len(named["images"]) == 6
    assert len(named["failures"]) == 1
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {result["image_id"] for result in results} <= {0, 1, 2, 5, 6, 7}
    assert results


def test_learned_queries_cannot_be_chosen_anew(
    ddetr: Callable[..., Outcome], shapes: Path, tiny_run: Any, tmp_path: Path
) -> None:
    predict = ("predict", "--checkpoint", tiny_run.path / "best.pth", "--output", tmp_path / "out", shapes / "val")
    evaluate = ("eval", "--checkpoint", tiny_run.path / "best.pth", "--data", shapes)
    for command in (predict, evaluate):
        for option in (("--num_queries", "5"), ("--query_selection", "peaks")):
            outcome = ddetr(*command, *option)
            assert outcome.code == 2
            assert f"{option[0][2:]} can be chosen for a two-stage network alone" in outcome.err
    assert not (tmp_path / "out").exists()


def test_predict_fails_where_nothing_could_be_read(
    ddetr: Callable[..., Outcome], tiny_run: Any, tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    outcome = ddetr("predict", "--checkpoint", tiny_run.path / "best.pth", "--output", "out", "broken.jpg")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "ddetr: error: none of the 1 images could be read"


def test_audit_names_degenerate_boxes(ddetr: Callable[..., Outcome], cells: Path, tmp_path: Path) -> None:
    outcome = ddetr("data", "audit", cells, "--output", "reports/cells.json")
    assert outcome.code == 0, outcome.err
    assert "degenerate-box" in outcome.out
    report = json.loads((tmp_path / "reports" / "cells.json").read_text())
    assert report["ok"] is True
    found = {finding["kind"]: finding for finding in report["findings"]}["degenerate-box"]
    assert found["action"] == "dropped"
    assert found["count"] >= 1

    strict = ddetr("data", "audit", cells, "--strict")
    assert strict.code == 2
    assert "must be repaired before training, see the table above" in strict.err


def test_audit_refuses_with_exit_code_2(ddetr: Callable[..., Outcome], shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    image = folder / "train" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:600])
    assert ddetr("data", "audit", folder).code == 0
    for switch in (["--decode"], ["--decode", "true"]):
        outcome = ddetr("data", "audit", folder, *switch)
        assert outcome.code == 2
        assert "unreadable-image" in outcome.out
    outcome = ddetr("data", "audit", folder, "--decode", "--output", "report.json")
    assert outcome.code == 2
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is False


def test_demo_runs(ddetr: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a small number of images; the full one is `make demo`."""
    outcome = ddetr("demo", "--num_train", "16", "--num_val", "2", "--epochs", "1", "--output", "out")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "best.pth").is_file()
    assert "What next:" in outcome.out
    assert ddetr("demo", "--num_train", "0").code == 2


def test_round_trip_with_gapped_category_ids(ddetr: Callable[..., Outcome], any_coco: Path, tmp_path: Path) -> None:
    """COCO images: train -> checkpoint -> predict -> eval, in the data set's own category ids."""
    source = any_coco
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    # donuts, a keyboard, a bear: few and large objects
    chosen = {24577, 188416, 542720} if source.name == "coco_tiny" else {image["id"] for image in content["images"][:3]}
    images = [image for image in content["images"] if image["id"] in chosen]
    objects = [annotation for annotation in content["annotations"] if annotation["image_id"] in chosen]
    assert {annotation["category_id"] for annotation in objects} == {23, 60, 76}
    for split in ("train", "val"):
        (tmp_path / "mini" / split).mkdir(parents=True)
        (tmp_path / "mini" / "annotations").mkdir(exist_ok=True)
        for image in images:
            shutil.copy(source / "train2017" / image["file_name"], tmp_path / "mini" / split)
        subset = {"images": images, "annotations": objects, "categories": content["categories"]}
        (tmp_path / "mini" / "annotations" / f"instances_{split}.json").write_text(json.dumps(subset))

    settings = ["--data", "mini", "--data.image_size", "96", "--data.augmentation", "none", "--data.num_workers", "0"]
    optim = ["--optim.lr", "3e-3", "--optim.clip_max_norm", "1", "--model.dropout", "0"]
    schedule = ["--epochs", "60", "--batch_size", "3", "--device_batch_size", "3", "--val_every", "60"]
    outcome = ddetr("train", *settings, *optim, *schedule, "--output", "run", "--num_pictures", "0", *MODEL)
    assert outcome.code == 0, outcome.err
    trained = json.loads(Path("run/metrics.json").read_text())["last"]
    assert trained["AP"] > 0.1

    outcome = ddetr(
        "eval", "--checkpoint", "run/last.pth", "--data", "mini", "--batch_size", "3", "--output", "evaluated"
    )
    assert outcome.code == 0, outcome.err
    measured = json.loads(Path("evaluated/metrics.json").read_text())
    assert measured == {name: trained[name] for name in measured}

    outcome = ddetr(
        "predict", "--checkpoint", "run/last.pth", "mini/val", "--output", "predicted", "--threshold", "0.1"
    )
    assert outcome.code == 0, outcome.err
    results = json.loads(Path("predicted/predictions.json").read_text())
    best = {}
    for result in sorted(results, key=lambda result: result["score"]):
        best[result["image_id"]] = result["category_id"]
    truth = {annotation["image_id"]: annotation["category_id"] for annotation in objects}
    assert best == truth  # the bear is a 23 and not a 21, which is its label
    named = json.loads(Path("predicted/predictions_named.json").read_text())
    assert [category["category_id"] for category in named["categories"]][-1] == 90
