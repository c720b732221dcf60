"""What a text after --weights means, and the catalogue of names."""

import inspect
import re
from pathlib import Path

import pytest
from served_weights import Repo, Served

from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.weight_files import sources
from ddetr.weight_files.catalogue import Entry, catalogue
from ddetr.weight_files.hub import hub_place
from ddetr.weight_files.sources import find_weights, is_cached, is_public


def refused(source: str | Path) -> str:
    with pytest.raises(InputError) as error:
        find_weights(source)
    return str(error.value)


def test_a_path_that_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deformable-detr-r50").write_text("x")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_weights("deformable-detr-r50") == Path("deformable-detr-r50")
    assert find_weights("org/name") == Path("org/name")
    assert find_weights(tmp_path / "org") == tmp_path / "org"
    assert not is_public("org/name")
    assert is_public("org/other")


def test_a_name_of_the_catalogue(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.repos["org/r50"] = Repo({"main": {"model.safetensors": b"weights of a name"}})
    served.files["best.pth"] = b"weights of another"
    host = served.address.replace("127.0.0.1", "localhost")  # whose files are no repositories
    entries = [
        Entry("mine", "p", "hf://org/r50", None, None, None, None, "coco-80", {}, ""),
        Entry("far", "p", f"{host}/files/best.pth", None, "00c0ffee", None, None, "coco-80", {}, ""),
    ]
    monkeypatch.setattr(sources, "catalogue", lambda: {entry.name: entry for entry in entries})
    assert [is_cached(entry) for entry in entries] == [False, False]
    assert (find_weights("mine") / "model.safetensors").read_bytes() == b"weights of a name"
    assert [is_cached(entry) for entry in entries] == [True, False]
    assert "what came is not the published file (sha256" in refused("far"), "its checksum is in the catalogue"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("deformable-detr-r50-two-stag", r"nothing of this name \(did you mean deformable-detr-r50-two-stage\?\)"),
        ("nonsense", "expected a name of `ddetr weights list`, a hub id .* an https address or a file"),
        ("s3://bucket/best.pth", "expected a name of `ddetr weights list`"),
        ("hf://name", "expected a name of `ddetr weights list`"),
        ("best.pth", r"there is no best\.pth"),
        ("runs/mine/bast.pth", r"has no 'bast\.pth' \(did you mean best\.pth\?\)"),
        ("runs/other", "has no 'other'; the repository of the hub is hf://runs/other"),
        ("elsewhere/best.pth", "has no 'elsewhere'"),
        ("./x/y", "there is no x/y"),
        ("/no/such/file", "there is no /no/such/file"),
        ("C:\\weights\\best", "there is no "),
        ("x" * 5000, "there is nothing of this name"),
    ],
)
def test_what_means_nothing(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks a server: a path with a mistake in it is no hub id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "find_on_hub", lambda place: pytest.fail(f"{place} was looked for"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "best.pth").write_text("x")
    text = refused(source)
    assert re.search(message, text), text
    assert len(text) < 1000


def test_a_path_is_nothing_but_a_path(tmp_path: Path) -> None:
    assert "has no 'name'" in refused(tmp_path / "name")
    assert "there is no deformable-detr-r50" in refused(Path("deformable-detr-r50"))


@pytest.mark.parametrize("entry", catalogue().values(), ids=lambda entry: entry.name)
def test_the_catalogue(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", entry.name)
    place = hub_place(entry.address)
    if entry.address.startswith("hf://"):
        assert place is not None
    else:
        assert place is None
        assert re.fullmatch(r"https://[\w./-]+\.pth", entry.address)
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{8,64}", entry.sha256)
    if entry.project == "mmdetection":  # its publishing script names files by their sha256
        assert entry.address.endswith(f"-{entry.sha256}.pth")
    assert entry.licence in ("apache-2.0", "mit")
    assert entry.ap is not None
    assert 35 < entry.ap < 60
    assert entry.classes in ("coco-91", "coco-80")
    known = inspect.signature(DeformableDETR).parameters
    assert all(name in known and value != known[name].default for name, value in entry.model.items())


def test_names_and_addresses_stand_once() -> None:
    entries = list(catalogue().values())
    assert len(entries) == 29
    assert len({entry.address for entry in entries}) == len(entries)
