"""Repositories of a hub: what of them is fetched, what is kept, and what is said where that cannot be."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from served_weights import Repo, Served

from ddetr.errors import InputError
from ddetr.weight_files.hub import HubPlace, _bar, check_repository, find_on_hub, hub_place, is_on_disk, upload
from ddetr.weight_files.sources import find_weights, fingerprint

WEIGHTS = bytes(range(256)) * 4_000  # 1 MB
CONFIG = {"config.json": b"{}", "preprocessor_config.json": b'{"size": 800}'}


def add(served: Served, files: dict[str, bytes], name: str = "org/detector", **options: Any) -> Repo:
    served.repos[name] = Repo({"main": dict(files)}, **options)
    return served.repos[name]


def refused(source: str) -> str:
    with pytest.raises(InputError) as error:
        find_weights(source)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", HubPlace("org/name")),
        ("hf://org/name", HubPlace("org/name")),
        ("org/name@v1.0", HubPlace("org/name", "v1.0")),
        ("org/name@refs/pr/3/best.pth", HubPlace("org/name", "refs/pr/3", "best.pth")),
        ("org/Mr.DETR/sub/best.pth", HubPlace("org/Mr.DETR", None, "sub/best.pth")),
        ("hf://org/name@v1/model.safetensors", HubPlace("org/name", "v1", "model.safetensors")),
        ("https://huggingface.co/org/name", HubPlace("org/name")),
        ("https://huggingface.co/org/name/resolve/main/a/b.pth?download=true", HubPlace("org/name", "main", "a/b.pth")),
        ("https://huggingface.co/org/name/blob/v1/b.pth", HubPlace("org/name", "v1", "b.pth")),
        ("https://huggingface.co/org/name/tree/main", HubPlace("org/name", "main")),
        ("https://example.org/org/name", None),
        ("https://huggingface.co/docs", None),
        ("name", None),
        ("org/name/../../etc/passwd", None),
        ("org/name@..", None),
        ("hf://../name", None),
        ("org/na me", None),
    ],
)
def test_what_means_a_repository(text: str, place: HubPlace | None) -> None:
    assert hub_place(text) == place


def test_a_repository_is_a_folder_of_what_is_needed(served: Served) -> None:
    others = {"pytorch_model.bin": b"x", "README.md": b"x", "tf_model.h5": b"x", "runs/model.safetensors": b"x"}
    add(served, CONFIG | {"model.safetensors": WEIGHTS} | others)
    folder = find_weights("org/detector")
    assert {path.name for path in folder.iterdir()} == {*CONFIG, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fingerprint(folder) == hashlib.sha256(WEIGHTS).hexdigest()
    before = len(served.asked("GET", "/resolve/"))
    assert find_weights("hf://org/detector") == folder
    assert len(served.asked("GET", "/resolve/")) == before == 3, "what is in the cache does not come again"


def test_who_downloads_shows_it_and_nobody_else(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    @contextmanager
    def reading(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: shown.append(f"{what}: {done} of {total} {unit}")

    monkeypatch.setattr("ddetr.console.reading", reading)
    add(served, CONFIG | {"model.safetensors": WEIGHTS})
    find_weights("org/detector")
    assert shown[-1] == "downloading org/detector: 1 of 1 MB"
    shown.clear()
    find_weights("org/detector")
    assert shown == []


def test_a_download_in_pieces_shows_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own storage, which the library reads with two bars: what has come, and what is written."""
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    shown: list[int] = []
    reporter = reporting.XetDownloadProgressReporter(
        reconstruction_desc="x", transfer_desc="x", total=100, log_level=logging.WARNING, tqdm_class=_bar(shown.append)
    )
    for come, written in ((40, 0), (80, 30), (100, 100)):
        report = SimpleNamespace(
            total_bytes=100,
            total_bytes_completed=written,
            total_bytes_completion_rate=1.0,
            total_transfer_bytes=100,
            total_transfer_bytes_completed=come,
            total_transfer_bytes_completion_rate=1.0,
        )
        reporter.update_progress(report)
    reporter.close()
    assert shown == sorted(shown)
    assert {40, 80, 100} <= set(shown)


def test_a_new_version_comes_and_a_revision_stays(served: Served) -> None:
    repo = add(served, {"model.safetensors": b"old" * 9})
    repo.branches["v1"] = dict(repo.branches["main"])
    assert (find_weights("org/detector") / "model.safetensors").read_bytes() == b"old" * 9
    repo.branches["main"]["model.safetensors"] = b"new" * 9
    assert (find_weights("org/detector") / "model.safetensors").read_bytes() == b"new" * 9
    assert (find_weights("org/detector@v1") / "model.safetensors").read_bytes() == b"old" * 9
    assert "has no revision 'v2'" in refused("org/detector@v2")


def test_weights_in_several_files(served: Served) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes(9) for i in (1, 2)}
    add(served, CONFIG | shards | {"model.safetensors.index.json": b"{}", "pytorch_model.bin": b"x"})
    folder = find_weights("org/detector")
    assert {path.name for path in folder.iterdir()} == {*CONFIG, *shards, "model.safetensors.index.json"}


def test_a_file_of_a_repository(served: Served) -> None:
    add(served, CONFIG | {"a.pth": b"aaa", "sub/b.pth": b"bbb", "sub/config.json": b"{}"})
    path = find_weights("org/detector/sub/b.pth")
    assert path.read_bytes() == b"bbb"
    assert (path.parent / "config.json").is_file(), "what describes it lies beside it"
    assert find_weights("org/detector/sub").name == "b.pth"
    message = refused("org/detector")
    assert "has 2: say which, as in org/detector/a.pth" in message
    assert "sub/b.pth" in message
    assert "has no such file (did you mean sub/b.pth?)" in refused("org/detector/sub/c.pth")
    add(served, {"README.md": b"x"}, "org/empty")
    assert "has none there" in refused("org/empty")


def test_a_cut_connection_is_gone_on_with(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    # The library keeps what came in pieces of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    add(served, {"model.safetensors": WEIGHTS})
    served.cuts = [600_000]
    assert (find_weights("org/detector") / "model.safetensors").read_bytes() == WEIGHTS
    assert [request.rpartition(" ")[2] for request in served.asked("GET", " from ")] == ["600000"]


def test_without_the_hub_what_is_there_is_used(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(served, CONFIG | {"model.safetensors": WEIGHTS})
    folder = find_weights("org/detector")
    served.is_down = True
    caplog.set_level(logging.INFO, "ddetr")
    assert find_weights("org/detector") == folder
    assert "as it lies in the cache" in caplog.text
    message = refused("org/other")
    assert f"cannot be downloaded from {served.address} (the hub answers 503)" in message
    assert message.endswith("and give the file itself"), "who calls may have no option for it"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(served.requests)
    assert find_weights("org/detector") == folder
    assert "HF_HUB_OFFLINE forbids to download it: unset it" in refused("org/other")
    assert len(served.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_weights("org/detector") == folder
    assert "cannot be downloaded from http://127.0.0.1:9 (there is no connection to it: " in refused("org/other")


def test_half_a_repository_in_the_cache_is_none(served: Served) -> None:
    add(served, CONFIG | {"model.safetensors": WEIGHTS})
    place = HubPlace("org/detector")
    assert not is_on_disk(place)
    folder = find_on_hub(place)
    assert is_on_disk(place)
    (folder / "model.safetensors").unlink()
    assert not is_on_disk(place)


def test_no_right_to_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add(served, {"model.safetensors": WEIGHTS}, "org/gated", gated=True)
    add(served, {"model.safetensors": WEIGHTS}, "org/private", private=True)
    assert f"accept their conditions on {served.address}/org/gated, then log in" in refused("org/gated")
    assert "no such repository, or it is private: check the name" in refused("org/private")
    assert "no such repository, or it is private: check the name" in refused("org/none")
    monkeypatch.setenv("HF_TOKEN", served.token)
    assert find_weights("org/gated").is_dir()
    assert find_weights("org/private").is_dir()


def test_damaged_bytes_in_the_cache(served: Served) -> None:
    add(served, {"model.safetensors": WEIGHTS})
    file = find_weights("org/detector") / "model.safetensors"
    file.resolve().write_bytes(WEIGHTS[:-1] + b"?")
    message = refused("org/detector")
    assert "its bytes are not those that were published" in message
    assert f"delete {file.resolve()}" in message
    file.resolve().unlink()
    assert find_weights("org/detector").is_dir()


def test_more_than_any_weights(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add(served, {"model.safetensors": WEIGHTS})
    monkeypatch.setattr("ddetr.weight_files.hub.MAX_WEIGHT_BYTES", 500_000)
    assert "expected at most 500,000 bytes of weights, they have 1,024,000" in refused("org/detector")
    assert not served.asked("GET", "/resolve/")


def test_a_full_disk(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    add(served, {"model.safetensors": WEIGHTS})
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "no room is left for the weights (No space left on device)" in refused("org/detector")
    assert "HF_HOME" in refused("org/detector")


def test_upload(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    for name, content in {**CONFIG, "model.safetensors": WEIGHTS, "README.md": b"# x\n"}.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="the hub does not know who you are: log in"):
        upload(folder, "me/detector")
    monkeypatch.setenv("HF_TOKEN", served.token)
    commit = upload(folder, "me/detector", private=True)
    assert commit.startswith(f"{served.address}/me/detector/commit/")
    assert served.repos["me/detector"].private
    assert served.cards == ["# x\n"], "the hub checks the card before anything is uploaded"
    assert served.repos["me/detector"].branches["main"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    upload(folder, "me/detector", revision="try")
    assert set(served.repos["me/detector"].branches) == {"main", "try"}
    assert (find_weights("me/detector@try") / "model.safetensors").read_bytes() == WEIGHTS
    add(served, {}, "me/public")
    with pytest.raises(InputError, match="me/public is public already"):
        upload(folder, "me/public", private=True)
    assert served.repos["me/public"].branches["main"] == {}


@pytest.mark.parametrize("name", ["name", "org/name/more", "org/na me", "../name", "org/name.git", "org/a--b", "a/.."])
def test_what_is_no_repository(name: str) -> None:
    with pytest.raises(InputError, match="expected a repository on the hub such as org/name"):
        check_repository(name)
