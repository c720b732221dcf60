"""What is published of a run: it tells the run, nothing of this machine, and comes back as the same detector."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from ddetr import Predictor
from ddetr.checkpoint import load_checkpoint
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.report.card.public import last_part, public_command, without_paths
from ddetr.report.card.release import write_release


@pytest.fixture
def run(tiny_run: Any, tmp_path: Path) -> Path:
    """A copy of a real run, which says that it was started by a person from somebody's weights."""
    folder = Path(shutil.copytree(tiny_run.path, tmp_path / "a run", ignore=shutil.ignore_patterns("*.ckpt")))
    file = folder / "environment.json"
    content = json.loads(file.read_text())
    content["sessions"][0]["environment"]["command"] = (
        "ddetr train --data /data/of/me/shapes --weights org/start --data.val_images=/data/of/me/val --epochs 25"
    )
    content["sessions"][0]["weights"] = {"source": "org/start", "is_public": True, "sha256": "ab" * 32}
    file.write_text(json.dumps(content))
    return folder


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_can_read_it(run: Path, tmp_path: Path) -> None:
    write_release(run, tmp_path / "out", "me/shapes", "apache-2.0")
    data = ModelCard(card_of(tmp_path / "out")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("ddetr", "object-detection", "apache-2.0")
    assert data.base_model == "org/start"
    results = {result.metric_type: result for result in data.eval_results}
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert results["AP"].metric_value == pytest.approx(best["AP"], abs=1e-4)
    assert results["AP50"].metric_value == pytest.approx(best["AP50"], abs=1e-4)
    assert results["AP"].task_type == "object-detection"
    assert results["AP"].dataset_name == "shapes/train"
    assert model_index_to_eval_results(data.to_dict()["model-index"])[0] == "shapes"


def test_it_tells_the_run(run: Path, tmp_path: Path) -> None:
    write_release(run, tmp_path / "out", "me/shapes", "apache-2.0")
    text = card_of(tmp_path / "out")
    best = json.loads((run / "metrics.json").read_text())["best"]
    for told in (
        "# shapes\n",
        "finds circle, square, triangle in images",
        "ddetr predict --weights me/shapes",
        'Predictor.from_pretrained("me/shapes")',
        f"| {best['AP']:.3f} | {best['AP50']:.3f} |",
        "| circle | ",
        "| training | shapes/train | 8 | ",
        "**8 of the validation images are training images too",
        "![losses and AP by step](curves.png)",
        f"It started from org/start (sha256 {'ab' * 8}).",
        "ddetr train --data shapes --weights org/start --data.val_images=val --epochs 25",
        "  image_size: 64\n",
        f"| PyTorch | {torch.__version__} |",
        "## Licence\n\napache-2.0",
    ):
        assert told in text, told
    assert "picture" not in text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_in_it_names_a_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    files = write_release(run, tmp_path / "out", "me/shapes", "apache-2.0", pictures=True)
    environment = json.loads((run / "environment.json").read_text())["sessions"][0]["environment"]
    secrets = ["/data/of", environment["folder"], str(tmp_path), str(Path.home()), "val_images: /"]
    for file in files:
        content = file.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, (file.name, secret)
    text = card_of(tmp_path / "out")
    assert environment["host"] not in re.findall(r"[\w.-]+", text)
    assert "](/" not in text


def test_pictures_are_shown_on_request_alone(run: Path, tmp_path: Path) -> None:
    names = [path.name for path in (run / "pictures").iterdir()]
    assert names
    without = write_release(run, tmp_path / "without", "me/shapes", "mit")
    shown = write_release(run, tmp_path / "with", "me/shapes", "mit", pictures=True)
    added = {path.name for path in shown} - {path.name for path in without}
    assert added == {f"picture-{i:02}.png" for i in range(1, len(names) + 1)}, "their own names stay here"
    assert all(f"({name})" in card_of(tmp_path / "with") for name in added)


def test_a_link_among_the_pictures_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(b"mine")
    shutil.rmtree(run / "pictures")
    (run / "pictures").mkdir()
    (run / "pictures" / "a.png").symlink_to(tmp_path / "private.png")
    files = write_release(run, tmp_path / "out", "me/shapes", "mit", pictures=True)
    assert not [file for file in files if file.name.startswith("picture")]


def test_the_results_are_those_of_the_weights(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["last"]["AP"] = 0.123
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "best.pth").unlink()
    write_release(run, tmp_path / "out", "me/shapes", "mit")
    assert "| 0.123 | " in card_of(tmp_path / "out")


def test_what_was_written_is_the_same_detector(
    run: Path, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(run, tmp_path / "out", "me/shapes", "apache-2.0")
    shutil.copy(tiny_run.image_example, tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", card_of(tmp_path / "out"), re.DOTALL | re.MULTILINE)
    defined: dict[str, Any] = {}
    exec(snippet.replace("me/shapes", str(tmp_path / "out")), defined)
    ours, theirs = Predictor.from_checkpoint(run / "best.pth").predict("image.jpg"), defined["found"]
    assert len(ours.names) > 0
    assert ours.scores.tolist() == theirs.scores.tolist()
    assert ours.boxes_xyxy.tolist() == theirs.boxes_xyxy.tolist()
    assert ours.names == theirs.names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    checkpoint = load_checkpoint(run / "best.pth")
    assert DeformableDETR(**{name: config[name] for name in checkpoint.config}).config == checkpoint.config
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 64, "longest_edge": checkpoint.input["max_size"]}


def test_names_of_classes_are_words_and_nothing_else(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["best"]["per_class"][0]["name"] = "<script>|a`b\n# c](http://x)\x1b"
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_release(run, tmp_path / "out", "me/shapes", "mit")
    (line,) = [line for line in card_of(tmp_path / "out").splitlines() if "script" in line]
    assert line.startswith("| &lt;script&gt;\\|a\\`b\\\\n# c\\](http://x)\\\\x1b | ")


def test_a_run_that_says_little(run: Path, tmp_path: Path) -> None:
    for name in ("environment.json", "audit.json", "metrics.json", "curves.png", "train.csv", "val.csv"):
        (run / name).unlink()
    write_release(run, tmp_path / "out", "me/shapes", "mit")
    text = card_of(tmp_path / "out")
    assert "nothing is known of its accuracy" in text
    assert "The run says nothing of its data." in text
    assert "curves.png" not in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("ddetr train --data /a/b/c --optim.lr 0.1", "ddetr train --data c --optim.lr 0.1"),
        ("ddetr train --data=~/birds/ --weights org/x", "ddetr train --data=birds --weights org/x"),
        (r"ddetr train --data 'C:\me\my birds'", "ddetr train --data 'my birds'"),
        ("ddetr train --weights org/y --data ..", "ddetr train --weights y --data .."),
        ("ddetr train --data.group_pattern '/home/me/(.*)_'", "ddetr train --data.group_pattern '(left out)'"),
        ("ddetr 'unclosed", None),
        (None, None),
    ],
)
def test_commands_without_folders(command: Any, shown: str | None) -> None:
    assert public_command(command, "org/x") == shown


def test_settings_without_folders() -> None:
    settings = {"data": {"path": "/a/b", "group_pattern": "x/(.*)"}, "freeze": ["backbone.*"], "n": 1, "w": "org/x"}
    assert without_paths(settings, "org/x") == {
        "data": {"path": "b", "group_pattern": "(left out)"},
        "freeze": ["backbone.*"],
        "n": 1,
        "w": "org/x",
    }
    assert last_part("/") == "."
    assert not re.search(r"[/\\]", last_part("../../"))
