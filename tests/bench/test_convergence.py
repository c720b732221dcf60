"""`ddetr bench convergence`: every side trains and is measured, what was interrupted goes on, and the figures are
right."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ddetr.bench.convergence import command, ours, tables
from ddetr.bench.convergence.curves import values_of
from ddetr.bench.convergence.faster_rcnn import FasterRcnn
from ddetr.bench.convergence.peers import PeerTraining, make_peer
from ddetr.bench.convergence.points import Curve, Point
from ddetr.bench.convergence.sides import SIDES, chosen_sides, with_options
from ddetr.bench.convergence.summary import reached, spread, summary
from ddetr.cli import main as cli
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.errors import InputError
from ddetr.runtime.environment import machine

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
Run = Callable[..., Any]


@pytest.fixture
def run(
    shapes: Path,
    tiny_model: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """`ddetr bench convergence ...` on a few images: exit code, error, and what convergence.json holds."""
    monkeypatch.chdir(tmp_path)
    own = {name: value for name, value in tiny_model.items() if name not in ("with_box_refine", "two_stage")}
    words = [word for name, value in own.items() for word in (f"--model.{name}", str(value).lower())]
    words += ["--batch_size", "4", "--device_batch_size", "2", "--data.image_size", "64", "--optim.warmup_steps", "0"]

    def call(*arguments: str, data: str = str(shapes), output: str = "out") -> Any:
        capsys.readouterr()
        command = ["bench", "convergence", "--data", data, *words, "--output", output, *arguments]
        monkeypatch.setattr("sys.argv", ["ddetr", *command])
        code = cli.main()
        captured = capsys.readouterr()
        file = Path(output, "convergence.json")
        report = json.loads(file.read_text()) if file.exists() else {}
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, report=report)

    return call


@pytest.fixture
def nobody_trains(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What trains is made up; returns who has been asked to, and with which seed."""
    asked: list[str] = []

    def train(first: Any, curve: Curve, file: Path, folder: Path) -> None:
        asked.append(f"{curve.side} {curve.seed}")
        curve.points = [Point(curve.epochs, 2, 8, 1.5, 0.1 + curve.seed / 100, 0.2)]
        curve.save(file)

    monkeypatch.setattr(command, "train_ours", train)
    monkeypatch.setattr(command, "train_peer", train)
    return asked


def config(shapes: Path, tiny_model: dict[str, Any], **more: Any) -> TrainConfig:
    data = DataConfig(str(shapes), augmentation="plain", image_size=64, num_workers=0)
    return TrainConfig(data, tiny_model, batch_size=4, device_batch_size=2, **more)


def test_every_side_trains_and_has_an_ap_after_each_epoch(run: Run) -> None:
    pytest.importorskip("transformers")
    sides = "fast+auxiliary.denoising=20,detr,faster-rcnn"
    outcome = run("--epochs", "2", "--sides", sides)
    assert outcome.code == 0, outcome.err
    curves = {curve["side"]: curve for curve in outcome.report["curves"]}
    assert list(curves) == sides.split(",")
    for name, curve in curves.items():
        assert [(p["epoch"], p["step"], p["images"]) for p in curve["points"]] == [(1, 2, 8), (2, 4, 16)], name
        first, second = (point["seconds"] for point in curve["points"])
        assert 0 < first < second
        assert all(0 <= point["AP"] <= point["AP50"] <= 1 for point in curve["points"])
        assert curve["parameters"] > 300_000
    assert Path("out/convergence.png").stat().st_size > 10_000
    text = Path("out/convergence.md").read_text()
    assert f"--sides {sides}`" in text
    assert "| never |" in text
    for name in curves:
        assert f"\n| {name} | 1 | " in text
        assert f"\n- {name}: " in text
    assert "faster-rcnn" in outcome.out


@pytest.mark.usefixtures("nobody_trains")
def test_a_set_is_drawn_and_minutes_become_epochs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "time_ours", lambda *_: 10.0)  # two steps per epoch
    drawn = ["--num_train", "8", "--num_val", "2", "--model.num_queries", "30"]
    outcome = run("--minutes", "0.9", "--sides", "plain", *drawn, data="shapes")
    assert outcome.code == 0, outcome.err
    assert outcome.report["curves"][0]["epochs"] == 2
    assert len(list(Path("out/shapes/train").iterdir())) == 8
    assert "shapes, 8 and 2" in Path("out/convergence.md").read_text()
    outcome = run("--minutes", "0.2", "--sides", "plain", *drawn, data="shapes", output="short")
    assert outcome.code == 2
    assert "--minutes 0.2: an epoch of plain takes about 0.33 minutes here" in outcome.err


@pytest.mark.usefixtures("nobody_trains")
def test_too_few_images_are_said_before_they_are_drawn(run: Run) -> None:
    outcome = run("--epochs", "1", "--sides", "plain", "--num_train", "2", data="shapes")
    assert outcome.code == 2
    assert "--num_train 2: expected at least a batch of 4 images" in outcome.err
    assert not Path("out/shapes").exists()


@pytest.mark.usefixtures("nobody_trains")
@pytest.mark.parametrize("budget", [("--epochs", "2"), ("--minutes", "0.7")])
def test_a_side_may_have_epochs_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch, budget: tuple[str, str]) -> None:
    monkeypatch.setattr(command, "time_ours", lambda *_: 10.0)  # two steps per epoch
    outcome = run(*budget, "--sides", "plain,plain+epochs=7")
    assert outcome.code == 0, outcome.err
    assert {curve["side"]: curve["epochs"] for curve in outcome.report["curves"]} == {"plain": 2, "plain+epochs=7": 7}
    assert {row["side"]: row["epochs"] for row in outcome.report["rows"]} == {"plain": 2, "plain+epochs=7": 7}
    assert "where its name says no other" in Path("out/convergence.md").read_text()


def test_the_time_of_steps_is_measured_for_both_kinds(shapes: Path, tiny_model: dict[str, Any]) -> None:
    from ddetr.datasets.splits import load_splits

    settings = config(shapes, tiny_model, epochs=1)
    train, val = load_splits(settings.data)
    device = torch.device("cpu")
    assert ours.time_ours(settings, train, device, warmup=1, steps=2) > 0
    training = PeerTraining(SIDES["faster-rcnn"], settings, train, val, device)
    assert training.time_steps(warmup=1, steps=2) > 0


def test_a_peer_that_was_interrupted_ends_as_one_that_was_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    words = ["--epochs", "2", "--sides", "detr", "--model.dropout", "0.1", "--optim.ema_decay", "0.9"]
    assert run(*words, output="whole").code == 0
    train_epoch = PeerTraining.train_epoch

    def interrupted(self: PeerTraining) -> None:
        if self.epoch == 1:
            raise KeyboardInterrupt
        train_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(PeerTraining, "train_epoch", interrupted)
        assert run(*words).code == 130
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    states = [torch.load(Path(name, "detr-seed0/state.pth")) for name in ("out", "whole")]
    for part in ("peer", "average"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[1][part])
    points = [json.loads(Path(name, "detr-seed0.json").read_text())["points"] for name in ("out", "whole")]
    assert [[point["AP"] for point in one] for one in points][0] == [point["AP"] for point in points[1]]
    assert points[0][0]["seconds"] < points[0][1]["seconds"]


def test_ours_that_was_interrupted_goes_on_counting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--epochs", "2", "--sides", "refine"]
    save = Curve.save

    def interrupted(self: Curve, path: Path) -> None:
        save(self, path)
        if self.points:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Curve, "save", interrupted)
        assert run(*words).code == 130
    first = json.loads(Path("out/refine-seed0.json").read_text())["points"]
    assert [point["epoch"] for point in first] == [1]
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    points = outcome.report["curves"][0]["points"]
    assert [(point["epoch"], point["step"]) for point in points] == [(1, 2), (2, 4)]
    assert 0 < points[0]["seconds"] < points[1]["seconds"]


def test_sides_and_seeds_are_added_to_a_finished_comparison(run: Run, nobody_trains: list[str]) -> None:
    assert run("--epochs", "1", "--sides", "plain").code == 0
    outcome = run("--epochs", "1", "--sides", "plain,faster-rcnn")
    assert outcome.code == 0, outcome.err
    outcome = run("--epochs", "1", "--sides", "faster-rcnn", "--seeds", "0,7")
    assert nobody_trains == ["plain 0", "faster-rcnn 0", "faster-rcnn 7"]
    assert [(row["side"], row["seeds"]) for row in outcome.report["rows"]] == [("plain", [0]), ("faster-rcnn", [0, 7])]
    assert outcome.report["rows"][1]["AP"] == pytest.approx({"mean": 0.135, "deviation": 0.07 / 2**0.5})
    assert len(outcome.report["commands"]) == 3

    outcome = run("--epochs", "2", "--sides", "plain")
    assert outcome.code == 2
    assert "out holds a comparison with other settings (--epochs 1 there, 2 here)" in outcome.err
    Path("out/plain-seed0.json").write_text("{}")
    outcome = run("--epochs", "1", "--sides", "plain")
    assert outcome.code == 2
    assert "plain-seed0.json: expected what ddetr bench convergence wrote, but it is damaged" in outcome.err
    assert "remove it and plain-seed0 beside it to train this side anew" in outcome.err


def test_results_never_stand_beside_settings_of_others(run: Run, nobody_trains: list[str]) -> None:
    """What is removed by hand is missed: a training without its curve, curves without their plan."""
    assert run("--epochs", "1", "--sides", "plain").code == 0
    Path("out/plain-seed0").mkdir()  # as its training leaves it
    kept = Path("out/plain-seed0.json").read_text()
    Path("out/plain-seed0.json").unlink()
    outcome = run("--epochs", "1", "--sides", "plain")
    assert outcome.code == 2
    assert "plain-seed0.json beside it is gone: remove it too to train this side anew" in outcome.err

    Path("out/plain-seed0.json").write_text(kept)
    Path("out/plan.json").unlink()
    outcome = run("--epochs", "1", "--sides", "plain", "--optim.lr", "0.01")
    assert outcome.code == 2
    assert "holds plain-seed0.json of a comparison whose plan.json is gone" in outcome.err
    assert "choose another --output" in outcome.err
    assert nobody_trains == ["plain 0"]


@pytest.mark.usefixtures("nobody_trains")
@pytest.mark.parametrize("change", [{"epochs": None}, {"epochs": {"nosuch": 1}}, {"options": {"plain": 3}}, {"a": 1}])
def test_a_damaged_plan_is_named(run: Run, change: dict[str, Any]) -> None:
    assert run("--epochs", "1", "--sides", "plain").code == 0
    plan = Path("out/plan.json")
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))
    outcome = run("--epochs", "1", "--sides", "plain")
    assert outcome.code == 2
    assert "plan.json: expected what ddetr bench convergence wrote, but it is damaged: choose another" in outcome.err


def test_a_drawn_set_is_the_same_however_the_folder_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def train(config: TrainConfig, curve: Curve, file: Path, folder: Path) -> None:
        asked.append(config.data.path)

    monkeypatch.setattr(command, "train_ours", train)
    drawn = ["--num_train", "8", "--num_val", "2", "--epochs", "1", "--sides", "plain"]
    for output in ("out", str(Path("out").resolve())):
        run(*drawn, data="shapes", output=output)
    assert asked == [str(Path("out/shapes").resolve())] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench convergence needs --minutes or --epochs"),
        (["--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--epochs", "1", "--sides", "plain,fats"], "got 'fats' (did you mean fast?)"),
        (["--epochs", "1", "--sides", "fast+optim.lr"], "expected fast+OPTION=VALUE, got 'optim.lr'"),
        (["--epochs", "1", "--sides", "fast+optim.rl=1"], "'optim.rl' is no option of training (did you mean optim.lr"),
        (["--epochs", "1", "--sides", "detr+optim.lr_backbone=low"], "lr_backbone must be a number, got 'low'"),
        (["--epochs", "1", "--sides", "fast+seed=3"], "seed cannot be chosen in a comparison"),
        (["--epochs", "1", "--sides", "fast+epochs=0"], "epochs must be at least 1, got 0"),
        (["--epochs", "1", "--sides", "fast+optim.lr=fast"], "optim.lr: expected a value such as 0.001, got 'fast'"),
        (["--epochs", "1", "--sides", "fast+epochs=1.5"], "fast+epochs=1.5: epochs: expected a value such as"),
        (["--epochs", "1", "--sides", "fast+compile=true"], "networks as they are: leave --compile out"),
        (["--epochs", "1", "--sides", "detr+precision=fp16"], "detr+precision=fp16 trains with 32 or bf16 here"),
        (["--epochs", "1", "--sides", "detr+auxiliary.denoising=5"], "auxiliary.denoising changes nothing of detr"),
        (["--epochs", "1", "--sides", "detr+optim.freeze=[a]"], "optim.freeze changes nothing of detr: leave it out"),
        (["--epochs", "1", "--sides", "faster-rcnn+model.nheads=2"], "model.nheads changes nothing of faster-rcnn"),
        (
            ["--epochs", "1", "--sides", "fast+batch_size=9"],
            "batch_size is the same for all sides: give it as an option",
        ),
        (["--epochs", "1", "--sides", "plain+model.query_selection=peaks"], "needs two_stage"),
        (["--epochs", "1", "--seeds", "0,a"], "--seeds: expected numbers such as 0,1,2, got '0,a'"),
        (["--epochs", "1", "--seeds", "-1"], "--seeds: expected numbers from 0 to 4294967295, got '-1'"),
        (["--epochs", "1", "--batch_size", "auto"], "--batch_size and --device_batch_size are numbers here"),
        (["--epochs", "1", "--precision", "fp16"], "--precision fp16: detr trains with 32 or bf16 here"),
        (["--epochs", "1", "--optim.freeze", "backbone.*"], "--optim.freeze names parameters of ours, and detr has"),
        (["--epochs", "1", "--sides", "faster-rcnn", "--model.backbone", "resnet9"], "unknown backbone 'resnet9'"),
    ],
)
def test_what_cannot_be_compared_is_refused(run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()[-1]) < 500


@pytest.mark.usefixtures("nobody_trains")
def test_without_transformers_its_sides_are_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ddetr.bench.convergence.detr", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = run("--epochs", "1", "--sides", "detr,detr-dc5")
    assert outcome.code == 2
    assert "--sides: none of them can train here (detr: transformers is not installed; detr-dc5" in outcome.err
    outcome = run("--epochs", "1", "--sides", "plain,detr")
    assert outcome.code == 0, outcome.err
    assert "left out: detr: transformers is not installed" in outcome.out
    assert [row["side"] for row in outcome.report["rows"]] == ["plain"]


def test_the_dilated_backbone_has_a_finer_map(shapes: Path, tiny_model: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    settings = config(shapes, tiny_model | {"backbone": "resnet10t"})
    plain, dilated = (make_peer(SIDES[name], settings, 3) for name in ("detr", "detr-dc5"))
    images = torch.zeros(1, 3, 64, 96)
    assert [tuple(peer.body(images)[0].shape[2:]) for peer in (plain, dilated)] == [(2, 3), (4, 6)]
    batch = (
        torch.zeros(1, 3, 64, 96, dtype=torch.uint8),
        None,
        [{"labels": torch.tensor([2]), "boxes": torch.full((1, 4), 0.5)}],
    )
    assert dilated.loss(batch).isfinite()


def test_faster_rcnn_gets_pixels_of_its_image_and_gives_those_of_the_original(
    shapes: Path, tiny_model: dict[str, Any]
) -> None:
    peer = FasterRcnn(config(shapes, tiny_model), 3)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:], mask[1, :, 32:] = True, True  # the second image has 48 x 32 pixels
    boxes = [torch.tensor([[0.5, 0.5, 1.0, 0.5]]), torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.1]])]
    sizes = [torch.tensor([640, 960]), torch.tensor([480, 320])]
    labels = [torch.tensor([2]), torch.tensor([0, 1])]
    targets = [{"boxes": b, "labels": n, "orig_size": s} for b, n, s in zip(boxes, labels, sizes)]
    batch = (torch.zeros(2, 3, 64, 96, dtype=torch.uint8), mask, targets)
    assert peer.loss(batch).isfinite()
    for mode in (True, False):  # as large in training as where it is measured
        padded, _ = peer.train(mode).net.transform([torch.zeros(3, 64, 96), torch.zeros(3, 48, 32)])
        assert (padded.tensors.shape, padded.image_sizes) == ((2, 3, 64, 96), [(64, 96), (48, 32)])
    seen: list[Any] = []

    def net(images: list[torch.Tensor], wanted: Any = None) -> Any:
        seen.append((images, wanted))
        return {"loss": torch.tensor(1.0)} if wanted else [{**t, "scores": torch.ones(1)} for t in seen[0][1]]

    peer.net = None
    peer.__dict__["net"] = net
    peer.loss(batch)
    images, wanted = seen[0]
    assert [tuple(image.shape) for image in images] == [(3, 64, 96), (3, 48, 32)]
    assert [target["boxes"].tolist() for target in wanted] == [[[0, 16, 96, 48]], [[0, 12, 16, 36]]]
    assert [target["labels"].tolist() for target in wanted] == [[3], [1]]  # a box without width is left out
    found = peer.detect(batch)
    assert [one["boxes"].tolist() for one in found] == [[[0, 160, 960, 480]], [[0, 120, 160, 360]]]
    assert [one["labels"].tolist() for one in found] == [[2], [0]]


def test_the_others_have_their_own_rates(shapes: Path, tiny_model: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from ddetr.datasets.splits import load_splits

    settings = config(shapes, tiny_model)
    train, val = load_splits(settings.data)
    training = PeerTraining(SIDES["detr"], settings, train, val, torch.device("cpu"))
    assert [group["rate"] for group in training.optimizer.param_groups] == [1e-4, 1e-4]  # published, beside our 2e-4
    settings = replace(settings, weights="trained.pth")
    training = PeerTraining(SIDES["detr"], settings, train, val, torch.device("cpu"))
    assert [group["rate"] for group in training.optimizer.param_groups] == pytest.approx([1e-4, 1e-5])
    (side,) = chosen_sides("detr+optim.lr=0.003")
    training = PeerTraining(side, side.config(settings), train, val, torch.device("cpu"))
    assert [group["rate"] for group in training.optimizer.param_groups] == pytest.approx([3e-3, 3e-4])
    grouped = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in training.peer.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("detr", (2e-4, 8e-5)),  # at 5e-4 it does not learn
        ("faster-rcnn", (1e-3, 4e-4)),
        ("detr+optim.lr=0.003", (3e-3, 2e-4)),
        ("faster-rcnn+optim.lr_backbone=0.001", (1e-3, 1e-3)),
        ("detr+optim.lr_backbone=0.001", (2e-4, 1e-3)),
    ],
)
def test_a_backbone_rate_that_is_given_is_for_all(
    shapes: Path, tiny_model: dict[str, Any], name: str, rates: tuple[float, float]
) -> None:
    (side,) = chosen_sides(name)
    base = config(shapes, tiny_model, optim=OptimConfig(lr=1e-3, lr_backbone=4e-4))
    assert side.rates(side.config(base)) == pytest.approx(rates)


def test_weights_of_the_others_are_averaged_too(
    shapes: Path, tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their place while they are measured, and only then; by the rule of ours."""
    from ddetr.datasets.splits import load_splits

    settings = config(shapes, tiny_model, optim=OptimConfig(ema_decay=0.9))
    training = PeerTraining(SIDES["faster-rcnn"], settings, *load_splits(settings.data), torch.device("cpu"))
    name = "net.roi_heads.box_predictor.cls_score.weight"
    expected, after = training.peer.state_dict()[name].clone(), []
    for step, batch in enumerate(training._batches()):
        training.take_step(batch)
        after.append(training.peer.state_dict()[name].clone())
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * after[-1]
    measured = []

    def detect(batch: Any) -> list[dict[str, torch.Tensor]]:
        measured.append(training.peer.state_dict()[name].clone())
        return []

    monkeypatch.setattr(training.peer, "detect", detect)
    monkeypatch.setattr(training, "evaluator", SimpleNamespace(reset=lambda: 0, update=lambda *_: 0, compute=lambda: 0))
    training.validate()
    torch.testing.assert_close(measured[0], expected)
    assert not torch.equal(expected, after[-1])
    assert torch.equal(training.peer.state_dict()[name], after[-1])


def test_options_of_a_side(shapes: Path, tiny_model: dict[str, Any]) -> None:
    base = config(shapes, tiny_model)
    made = with_options(base, {"model.two_stage": True, "auxiliary.denoising": 7, "optim.lr": 1, "epochs": 3})
    assert (made.model["two_stage"], made.model["hidden_dim"]) == (True, tiny_model["hidden_dim"])
    assert (made.auxiliary.denoising, made.optim.lr, made.epochs) == (7, 1, 3)
    assert base.auxiliary.denoising == 0
    with pytest.raises(InputError, match=r"model\.two_stage: expected a value such as False, got '1'"):
        with_options(base, {"model.two_stage": 1})
    assert SIDES["detr"].rates(replace(base, optim=OptimConfig(lr=0.0))) == (0, 0)
    (side,) = chosen_sides("detr+optim.lr=1e-4")
    assert side.config(base).optim.lr == 1e-4
    assert chosen_sides("detr+optim.lr=1.5e1")[0].config(base).optim.lr == 15
    side, again = chosen_sides("fast+auxiliary.denoising=20+model.query_selection=distinct,fast")
    settings = side.config(base)
    assert (settings.auxiliary.denoising, settings.model["query_selection"]) == (20, "distinct")
    assert again.config(base).auxiliary.denoising == 100
    for side in SIDES.values():
        if side.is_ours:
            assert ours.check_ours(side.config(base), 3) > 0, side.name


def curve(side: str, seed: int, *ap: float, epochs: int = 2) -> Curve:
    made = Curve(side, seed, epochs, batch_size=4, parameters=1_000_000, machine="a machine")
    made.points = [Point(i, 10 * i, 40 * i, 5.0 * i, a, a + 0.1) for i, a in enumerate(ap, 1)]
    return made


def test_when_an_ap_is_reached() -> None:
    found = curve("a", 0, 0.2, 0.6, 0.4, 0.9)
    assert reached(found, 0.1) == pytest.approx({"epoch": 0.5, "images": 20, "seconds": 2.5})
    assert reached(found, 0.2) == pytest.approx({"epoch": 1, "images": 40, "seconds": 5})
    assert reached(found, 0.5) == pytest.approx({"epoch": 1.75, "images": 70, "seconds": 8.75})  # the first time
    assert reached(found, 0.95) is None
    assert reached(found, 0.0) is None
    assert reached(curve("a", 0), 0.1) is None


def test_the_table_has_means_and_spreads() -> None:
    curves = [curve("a", 0, 0.4, 0.8), curve("a", 1, 0.2, 0.6), curve("b", 0, 0.2), curve("c", 0)]
    rows, levels = summary(curves)
    assert levels == pytest.approx({"AP 0.3": 0.3, "AP 0.5": 0.5, "AP 0.7": 0.7, "90% of the best AP": 0.63})
    a, b = rows  # c has no point yet
    assert a["AP"] == pytest.approx({"mean": 0.7, "deviation": 0.02**0.5})
    assert a["reached"]["AP 0.3"]["epoch"]["mean"] == pytest.approx((0.75 + 1.25) / 2)
    assert a["reached"]["AP 0.7"]["seeds"] == 1
    assert (a["unfinished"], b["unfinished"]) == ([], [0])
    assert a["seconds a step"]["mean"] == pytest.approx(0.5)
    assert b["reached"]["AP 0.3"] == {"seeds": 0}
    settings = {"minutes": None, "epochs": 2, "data.path": "data", "data.image_size": 64, "batch_size": 4}
    report = {
        "machine": machine(torch.device("cpu")),
        "machines": ["a machine"],
        "commands": ["ddetr bench convergence"],
        "clock": "CPU seconds",
        "settings": settings | {"model.backbone": "resnet50", "model.pretrained_backbone": False},
        "num_images": [8, 4],
        "sides": {"a": "the first", "b": "the second"},
        "left_out": {"detr": "not installed"},
        "levels": levels,
        "rows": rows,
    }
    text = tables.markdown(report)
    assert "| a | 2 | 0.700 ± 0.141 | 0.800 ± 0.141 | 1.0 ± 0.4 epochs, 40 images, 5 ± 2 s |" in text
    assert "epochs, 70 images, 9 s (1 of 2 seeds) |" in text
    assert "| b | 1 | 0.200 | 0.300 | never | never | never | never | 1 of 2 | 5 | 0.5 | 1.00 M |" in text
    assert "- not finished: b, seed 0" in text
    assert "- left out: detr: not installed" in text
    assert [len(table.columns) for table in tables.shown(report)] == [8, 5]


def test_curves_go_as_far_as_all_seeds_have_come() -> None:
    x, ap = values_of([curve("a", 0, 0.4, 0.8), curve("a", 1, 0.2)], "seconds")
    np.testing.assert_allclose(x, [[0, 5], [0, 5]])
    np.testing.assert_allclose(ap, [[0, 0.4], [0, 0.2]])
    assert spread([0.5]) == {"mean": 0.5, "deviation": None}


def test_a_state_of_something_else_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with monkeypatch.context() as patch:
        patch.setattr(command, "train_peer", lambda *_: None)
        run("--epochs", "1", "--sides", "detr")
    state = Path("out/detr-seed0/state.pth")
    state.parent.mkdir(parents=True)
    state.write_bytes(b"no state")
    outcome = run("--epochs", "1", "--sides", "detr")
    assert outcome.code == 2
    assert "state.pth: expected a state that ddetr bench convergence saved, but it cannot be read" in outcome.err
