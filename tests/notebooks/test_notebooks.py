"""The notebooks run from top to bottom, say and draw what they should, and are committed without outputs."""

import base64
import csv
import io
import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


class Executed:
    """A notebook after its run in `folder`; cells by their id. `changes`: what stands in it, and what runs instead."""

    def __init__(self, name: str, folder: Path, changes: Mapping[str, str] = {}):
        self.folder = folder
        text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
        for before, after in changes.items():
            assert text.count(before) == 1, f"{name}.ipynb does not have {before} once"
            text = text.replace(before, after)
        notebook = nbformat.reads(text, as_version=4)
        resources = {"metadata": {"path": str(folder)}}
        try:
            NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        except CellExecutionError as error:
            failed = next(
                cell for cell in notebook.cells if any(o.output_type == "error" for o in cell.get("outputs", []))
            )
            pytest.fail(f"{name}.ipynb, cell {failed.id}: {error.ename}: {error.evalue}\n{error}", pytrace=False)
        self.cells = {cell.id: cell.get("outputs", []) for cell in notebook.cells if cell.cell_type == "code"}
        for cell_id, outputs in self.cells.items():
            said = "".join(output.text for output in outputs if output.get("name") == "stderr")
            assert not said, f"{name}.ipynb, cell {cell_id} warns: {said}"

    def text(self, cell_id: str) -> str:
        """What the cell prints and shows as text, without colours."""
        parts = [
            output.text if output.output_type == "stream" else output.data.get("text/plain", "")
            for output in self.cells[cell_id]
        ]
        return re.sub(r"\x1b\[[0-9;]*m", "", "".join(parts))

    def pictures(self, cell_id: str) -> list[Image.Image]:
        """Those that the cell shows; each must have something on it."""
        data = [output.data["image/png"] for output in self.cells[cell_id] if "image/png" in output.get("data", {})]
        pictures = [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in data]
        for picture in pictures:
            assert min(picture.size) > 150
            assert len(picture.getcolors(maxcolors=10**7)) > 100, f"{cell_id}: an empty picture"
        return pictures

    def counts(self) -> dict[str, int]:
        """How many pictures each cell shows that shows any."""
        return {cell_id: len(self.pictures(cell_id)) for cell_id in self.cells if self.pictures(cell_id)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, as a person's would: 02 and 04 look at what 03 has trained, or train by themselves."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter and IPython leave nothing in the home folder, and take no settings from there."""
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])
def test_it_is_committed_stripped(path: Path) -> None:
    stripped = runpy.run_path(str(FOLDER / "strip.py"))["stripped"]
    text = path.read_text(encoding="utf-8")
    assert text == stripped(text), "run `make notebooks-strip`"
    ids = [cell["id"] for cell in json.loads(text)["cells"]]
    assert len(ids) == len(set(ids))


def test_stripping_takes_out_what_a_run_leaves() -> None:
    stripped = runpy.run_path(str(FOLDER / "strip.py"))["stripped"]
    text = NOTEBOOKS[0].read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata["widgets"] = {"a": 1}
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.execution_count, code.metadata["scrolled"] = 7, True
    code.outputs = [nbformat.v4.new_output("stream", text="a secret")]
    assert stripped(nbformat.writes(notebook)) == text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])
def test_its_links_lead_somewhere(path: Path) -> None:
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https)([^)]+)\)", text):
        assert (FOLDER / target).is_file()


@pytest.mark.timeout(900)
def test_01_checks_gpu_and_operator(folder: Path) -> None:
    done = Executed("01_check_the_gpu", folder)
    available, count = torch.cuda.is_available(), torch.cuda.device_count()
    assert re.search(rf"CUDA available\? +{available}\n.*\? +{count}\n", done.text("pytorch-check"))
    doctor = done.text("doctor-run")
    assert re.search(r"exit code \d+", doctor)
    assert torch.__version__ in doctor
    assert re.search(r"cpu +\w+ +active", done.text("backends-list"))
    compared = re.findall(r"^cpu .* differs by (\S+)  ok$", done.text("compare-run"), re.MULTILINE)
    assert len(compared) == 4
    assert all(float(difference) < 1e-4 for difference in compared)
    assert re.search(r"^cpu +forward \+ backward: +[\d.]+ ms", done.text("time-run"), re.MULTILINE)


def check_03(folder: Path, changes: Mapping[str, str], steps: list[int]) -> float:
    """The AP50 that it reaches."""
    done = Executed("03_train_on_your_own_data", folder, changes)
    run = folder / "runs" / "train"
    assert done.counts() == {"look-draw": 1, "curves-draw": 1}
    assert "Training may start" in done.text("audit-run")
    assert "Preflight" in done.text("training-run")
    assert "Stopped. In the folder:" in done.text("training-run")
    assert "last.ckpt" in done.text("training-run")
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [session["state"] for session in sessions] == ["stopped", "finished"]
    with (run / "val.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == steps
    assert "COCO metrics: 60 images" in done.text("resume-run")
    assert "report.html" in done.text("report-show")
    return json.loads((run / "metrics.json").read_text())["last"]["AP50"]


@pytest.mark.timeout(900)
def test_03_trains_stops_and_goes_on(folder: Path) -> None:
    """A seventh of its training: `test_03_and_04_in_full_length` has all of it."""
    check_03(folder, {"EPOCHS = 8": "EPOCHS = 3", "num_train=800": "num_train=320"}, [20, 40, 60])


def check_02(folder: Path) -> None:
    done = Executed("02_the_model_and_its_sampling", folder)
    cells = ("initial-draw", "detector-load", "levels-draw", "query-draw", "heads-draw", "refinement-draw")
    assert done.counts() == dict.fromkeys(cells, 1)
    assert "backbone              23.51 million" in done.text("build")
    shapes = done.text("forward-run")
    for line in (
        "level 0, stride  8          (32, 40) = 1280 cells",
        "(2, 300, 80)",
        "(2, 300, 4)",
        "(2, 300, 8, 4, 4, 2)",
    ):
        assert line in shapes


def check_04(folder: Path) -> None:
    done = Executed("04_evaluate_errors_predict", folder)
    cells = {"threshold-draw": 1, "errors-draw": 1, "images-draw": 2, "predict-run": 1}
    assert done.counts() == cells
    checkpoint = folder / re.search(r"checkpoint (\S+)", done.text("load"))[1]
    best = json.loads((checkpoint.parent / "metrics.json").read_text())["best"]
    row = re.search(r"AP .*AP50.*\n.*\n. ([\d.]+) . ([\d.]+) ", done.text("evaluate-run"))
    np.testing.assert_allclose([float(row[1]), float(row[2])], [best["AP"], best["AP50"]], atol=2e-3)
    assert re.search(r"^(circle|square|triangle) +0\.\d\d  \[[\d., -]+\]$", done.text("predict-run"), re.MULTILINE)
    assert "'bbox'" in done.text("coco-show")
    assert float(re.search(r"largest difference of a score: (\S+)", done.text("optimize-run"))[1]) < 1e-3


@pytest.mark.timeout(900)
def test_02_shows_the_sampling(folder: Path) -> None:
    check_02(folder)


@pytest.mark.timeout(900)
def test_04_evaluates_and_predicts(folder: Path) -> None:
    check_04(folder)


def check_05(folder: Path, changes: Mapping[str, str]) -> dict[str, float]:
    """The AP of both starts."""
    done = Executed("05_start_from_trained_weights", folder, changes)
    assert done.counts() == {"curves-draw": 1}
    assert "mean (0.5, 0.5, 0.5) and deviation (0.5, 0.5, 0.5)" in done.text("backbone-load")
    assert "stride 32: (1, 320, 10, 10)" in done.text("backbone-load")
    found = re.findall(r"from (trained weights|nothing): AP ([\d.]+), AP50 [\d.]+ after", done.text("curves-draw"))
    assert len(found) == 2
    return {start: float(ap) for start, ap in found}


@pytest.mark.timeout(900)
def test_05_starts_from_a_file(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pth")
    changes = {"WEIGHTS = None": "WEIGHTS = 'weights.pth'", "EPOCHS = 3": "EPOCHS = 1"}
    check_05(tmp_path, changes | {"num_train=400": "num_train=32", "num_val=60": "num_val=4"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_05_with_the_weights_of_pypi(tmp_path: Path) -> None:
    ap = check_05(tmp_path, {})
    assert ap["trained weights"] > ap["nothing"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_03_and_04_in_full_length(tmp_path: Path) -> None:
    """A minute and more of training, of which the short one does all but learn."""
    assert check_03(tmp_path, {}, list(range(50, 401, 50))) > 0.5
    check_04(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_02_and_04_work_where_nothing_was_trained(tmp_path: Path) -> None:
    check_02(tmp_path)  # trains
    assert [path.parent.name for path in tmp_path.glob("runs/*/best.pth")] == ["small"]
    check_04(tmp_path)
