"""Files of addresses: whole, checked, once for all processes, and resumed where they were cut."""

import errno
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from served_weights import Served

from ddetr.errors import InputError
from ddetr.weight_files import download as module
from ddetr.weight_files.download import cached_path, download
from ddetr.weight_files.files import read_file


def saved(value: float) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.full((1_280_000,), value)}, file)
    return file.getvalue()


WEIGHTS, OTHERS = saved(1.0), saved(2.0)  # 5 MB
SAFETENSORS = safetensors.torch.save({"a": torch.ones(1000)})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)


@pytest.fixture
def address(served: Served) -> str:
    served.files["best.pth"] = WEIGHTS
    return f"{served.address}/files/best.pth"


def refused(address: str, sha256: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        download(address, sha256)
    text = str(error.value)
    assert "\n" not in text
    return text


def left(address: str) -> set[str]:
    return {path.name.partition("best-")[2][8:] for path in cached_path(address).parent.iterdir()} - {".pth.lock"}


def test_a_file_comes_once_and_is_remembered(served: Served, address: str) -> None:
    path = download(address)
    assert path.read_bytes() == WEIGHTS
    assert path == cached_path(address)
    assert path.suffix == ".pth"
    assert left(address) == {".pth", ".pth.json"}
    record = json.loads(path.with_name(path.name + ".json").read_text())
    assert record["sha256"] == SHA256
    assert record["address"] == address
    served.is_down = True
    assert download(address) == path
    assert len(served.requests) == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = "https://example.org/a/best.pth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("DDETR_CACHE", raising=False)
    assert cached_path(address).parent == tmp_path / "xdg" / "huggingface" / "ddetr"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert cached_path(address).parent == tmp_path / "hub" / "ddetr"
    monkeypatch.setenv("DDETR_CACHE", str(tmp_path / "mine"))
    assert cached_path(address).parent == tmp_path / "mine"
    assert cached_path(address).name != cached_path("https://example.org/b/best.pth").name
    assert cached_path("https://example.org/").suffix == ".pth"


def test_a_cut_connection_is_gone_on_with(served: Served, address: str) -> None:
    served.cuts = [1_500_000, 2_000_000]
    assert download(address).read_bytes() == WEIGHTS
    firsts = [int(request.rpartition(" ")[2]) for request in served.asked("GET", " from ")]
    assert len(firsts) == 2
    assert 0 < firsts[0] <= 1_500_000
    assert firsts[0] < firsts[1] <= firsts[0] + 2_000_000


def test_what_came_is_kept_for_the_next_call(served: Served, address: str) -> None:
    served.cuts = [1_500_000, 0, 0, 0, 0]
    message = refused(address, SHA256)
    assert "which are kept for the next try: try again later" in message
    assert left(address) == {".pth.part", ".pth.json"}
    served.cuts = []
    assert download(address, SHA256).read_bytes() == WEIGHTS
    assert " from " in served.requests[-1]
    assert left(address) == {".pth", ".pth.json"}


def test_a_file_that_changed_between_two_tries_begins_anew(served: Served, address: str) -> None:
    served.cuts = [1_500_000, 0, 0, 0, 0]
    refused(address)
    served.cuts, served.files["best.pth"] = [], OTHERS
    assert download(address).read_bytes() == OTHERS


def test_a_part_that_is_whole_already(served: Served, address: str) -> None:
    """The process was killed between the last byte and the renaming."""
    path = download(address)
    path.rename(path.with_name(path.name + ".part"))
    assert download(address).read_bytes() == WEIGHTS
    assert served.requests[-1].endswith(f" from {len(WEIGHTS)}")


def test_the_published_checksum(served: Served, address: str) -> None:
    assert "what came is not the published file" in refused(address, "00c0ffee")
    assert left(address) == {".pth.json"}, "nothing of it is kept"
    path = download(address, SHA256[:8])
    assert download(address, SHA256) == path
    assert "its bytes are not those that came from" in refused(address, "00c0ffee")


def test_a_file_that_is_changed_in_the_cache_or_on_the_server(served: Served, address: str) -> None:
    path = download(address)
    path.write_bytes(WEIGHTS[:-1] + b"?")
    assert f"{path}: its bytes are not those that came from {address}" in refused(address)
    path.unlink()
    assert download(address) == path
    path.unlink()
    served.files["best.pth"] = OTHERS
    message = refused(address)
    assert "the file there has changed since it was first downloaded" in message
    assert f"delete {path}.json" in message
    Path(f"{path}.json").unlink()
    assert download(address).read_bytes() == OTHERS


@pytest.mark.parametrize("says_version", [True, False])
def test_a_server_that_cuts_and_cannot_go_on_is_given_up(served: Served, address: str, says_version: bool) -> None:
    served.goes_on, served.cuts = False, [1_500_000, 1_200_000] * 20
    served.says_version = says_version
    message = refused(address)
    assert re.search(r"begins each try anew, and none got further than 1,\d{3},\d{3} bytes: try again later", message)
    assert "give the file itself" in message
    assert len(served.asked("GET", "best.pth")) == module.MOST_TRIES
    assert left(address) == {".pth.json"}


def test_a_server_that_cannot_go_on_but_gets_further(served: Served, address: str) -> None:
    served.goes_on, served.cuts = False, [1_500_000, 0, 2_500_000, 0, 1_500_000, 3_500_000]
    assert download(address).read_bytes() == WEIGHTS


def test_many_cuts_of_a_server_that_goes_on(served: Served, address: str) -> None:
    served.cuts = [1_200_000, 0, 0] * 3
    assert download(address).read_bytes() == WEIGHTS
    assert len(served.requests) > 2 * module.MOST_TRIES


class Hostile:
    def __reduce__(self) -> Any:
        return eval, ("1",)


def pickled_code() -> bytes:
    file = io.BytesIO()
    torch.save({"a": Hostile()}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its 0 bytes are damaged or cut short. Nothing of it was kept: try again"),
        (WEIGHTS[:2_000_000], "its 2,000,000 bytes are damaged or cut short. Nothing of it was kept: try again"),
        (SAFETENSORS[:3000], "its 3,000 bytes are damaged or cut short (Error while deserializing header"),
        (bytes(5000), "zeros, as an interrupted copy or download leaves them. Nothing of it was kept: try again"),
        (b'{"error": "busy"}', "got something else: JSON. Nothing of it was kept: try again"),
        (b"<head></head> a page of a server", "got something else: a web page"),
        (b"\n<!DOCTYPE html><html>a page of a server", "expected a file of weights, got a web page"),
        (pickled_code(), "the file wants to run 'eval', which was not done"),
        (pickle.dumps({"a": 1}, 4) + b" " * 10, "got something else: a pickle that torch.save did not write"),
    ],
)
def test_what_is_no_weights_is_not_kept(served: Served, address: str, content: bytes, message: str) -> None:
    served.says_length = False
    served.files["best.pth"] = content
    said = refused(address)
    assert said.startswith(f"{address}: expected ")
    assert message in said
    assert left(address) == {".pth.json"}
    served.files["best.pth"] = WEIGHTS
    assert download(address).read_bytes() == WEIGHTS, "as soon as the server is repaired"


def test_a_transfer_that_ends_early_without_a_length(served: Served, address: str) -> None:
    served.says_length, served.cuts = False, [1_500_000]
    assert "its 1,500,000 bytes are damaged or cut short" in refused(address)
    assert download(address).read_bytes() == WEIGHTS


def test_a_small_json_is_called_so(tmp_path: Path) -> None:
    for content, message in ((b'{"a": 1}', "got something else: JSON"), (b"short", "damaged or cut short")):
        (tmp_path / "w.json").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_file(tmp_path / "w.json")


def test_what_an_earlier_version_kept(served: Served, address: str) -> None:
    """It put everything that came into the cache, as the address calls it, with its checksum."""
    served.files["content"] = SAFETENSORS
    named = download(f"{served.address}/files/content")
    named.rename(named.with_suffix(""))
    assert download(f"{served.address}/files/content") == named
    assert not named.with_suffix("").exists()
    assert len(served.requests) == 1
    path = download(address)
    for content, served_now in ((b"", WEIGHTS), (WEIGHTS[:-9], OTHERS)):
        path.write_bytes(content)
        record = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        Path(f"{path}.json").write_text(json.dumps(record))
        served.files["best.pth"] = served_now
        assert download(address).read_bytes() == served_now


@pytest.mark.parametrize(
    ("name", "content", "suffix"),
    [
        ("content", SAFETENSORS, ".safetensors"),
        ("content", WEIGHTS, ".pth"),
        ("v1.0", SAFETENSORS, ".safetensors"),
        ("best.pth", SAFETENSORS, ".safetensors"),
        ("best.safetensors", WEIGHTS, ".pth"),
        ("best.safetensors", SAFETENSORS, ".safetensors"),
        ("best.bin", WEIGHTS, ".bin"),
    ],
)
def test_a_file_is_called_what_it_is(
    served: Served, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, suffix: str
) -> None:
    served.files[name] = content
    address = f"{served.address}/files/{name}?download=true"
    path = download(address)
    assert (path.suffix, path.read_bytes()) == (suffix, content)
    assert "a" in read_file(path).content
    assert cached_path(address) == path, "as `ddetr weights list` finds it"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download(address) == path
    assert len(served.requests) == 1
    path.write_bytes(content + b"?")
    assert "its bytes are not those that came" in refused(address), "and is checked"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}, b""), "there is no such file on the server (404)"),
        ((401, {}, b""), "the server wants a login, or forbids the download (401)"),
        ((403, {}, b""), "the server wants a login, or forbids the download (403)"),
        ((503, {}, b""), "cannot be downloaded (the server answers 503): try again later"),
        ((204, {}, b""), "expected a file, but the server answers 204"),
        ((200, {"Content-Type": "text/html; charset=utf-8"}, b"x"), "expected a file of weights, got a web page"),
        ((200, {}, b"\n<!DOCTYPE html><html>virus scan"), "expected a file of weights, got a web page"),
        ((302, {"Location": "ftp://example.org/x"}, b""), "which is no https address: it was not followed"),
        ((302, {"Location": "http://example.org/x"}, b""), "leads to http://example.org/x, which is no https address"),
        ((302, {"Location": "best.pth"}, b""), "leads from one address to the next without end"),
    ],
)
def test_answers_that_are_no_file(served: Served, address: str, answer: Any, message: str) -> None:
    served.answers["best.pth"] = answer
    assert message in refused(address)
    assert not cached_path(address).exists()


def test_a_redirect_is_followed(served: Served, address: str) -> None:
    served.answers["latest.pth"] = (302, {"Location": "best.pth"}, b"")
    assert download(f"{served.address}/files/latest.pth").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/best.pth", "anybody on the way can change what comes by http"),
        ("https://", "expected an address such as https://HOST/PATH/FILE"),
        ("https://host:port/x", "expected an address such as https://HOST/PATH/FILE"),
        ("https://host/a b", "expected an address such as https://HOST/PATH/FILE"),
        ("https://host/\x1b[2J", "expected an address such as https://HOST/PATH/FILE"),
    ],
)
def test_addresses_that_are_refused_unasked(address: str, message: str) -> None:
    assert message in refused(address)


def test_secrets_in_an_address_are_not_shown(served: Served) -> None:
    host = served.address.removeprefix("http://")
    message = refused(f"http://me:secret@{host}/files/none.pth?token=secret")
    assert message.startswith(f"http://{host}/files/none.pth: there is no such file")
    assert "secret" not in message


def test_no_server_and_offline(monkeypatch: pytest.MonkeyPatch, served: Served, address: str) -> None:
    message = refused("http://127.0.0.1:9/best.pth")
    assert "cannot be downloaded (ConnectError" in message
    assert message.endswith("Or download it where there is a network, and give the file itself")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not in the cache, and HF_HUB_OFFLINE forbids to download it" in refused(address)
    assert served.requests == []


def test_more_than_any_weights_and_more_than_fits(
    served: Served, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WEIGHT_BYTES", 1_000_000)
    assert f"expected at most 1,000,000 bytes of weights, it has {len(WEIGHTS):,}" in refused(address)
    monkeypatch.undo()
    monkeypatch.setenv("DDETR_CACHE", str(cached_path(address).parent))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    message = refused(address)
    assert "no room is left for the weights (5 MB are needed, 1 MB are free)" in message
    assert "DDETR_CACHE" in message


def test_a_disk_that_fills_up(served: Served, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    assert "no room is left for the weights (No space left on device)" in refused(address)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDETR_CACHE", str(tmp_path / "file" / "cache"))
    assert "the weights cannot be written there" in refused(address)


def test_several_processes_download_once(served: Served, address: str) -> None:
    code = f"from ddetr.weight_files.download import download; print(download({address!r}))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert paths == {str(cached_path(address))}
    assert cached_path(address).read_bytes() == WEIGHTS
    assert len(served.asked("GET", "best.pth")) == 1
