"""Files of https addresses in a cache folder: whole, checked, once for all processes, and resumed where they were cut.

FILE is named after its address. Beside it lie FILE.json (where it came from, and its sha256, against which it is
checked later) and, while it is on its way, FILE.part. Only what can be read as weights gets its name; where that says
nothing of the content, or something wrong, the file is FILE.safetensors or FILE.pth.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddetr import console
from ddetr.errors import InputError
from ddetr.files import write_text
from ddetr.printable import one_line
from ddetr.untrusted import MAX_RUN_BYTES, MAX_WEIGHT_BYTES, open_file, parse_json, read_text
from ddetr.weight_files.files import COPY_AGAIN, read_file, suffix_of_content

CACHE_VARIABLE = "DDETR_CACHE"
MOST_REDIRECTS = 10
MOST_TRIES = 4  # that get no further than those before
WAIT_SECONDS = 1.0  # before the second try; it doubles
_CHUNK = 2**20
_ENDS = (".safetensors", ".pth")  # that a name may get behind its own
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_BY_HAND = "Or download it where there is a network, and give the file itself"


def weights_folder() -> Path:
    """Where downloads lie: `DDETR_CACHE`, by default `ddetr` beside the hub's own cache in `HF_HOME`."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(caches, "huggingface")).expanduser() / "ddetr"


def cached_path(address: str) -> Path:
    """Where the file of an address lies, or would; once it is here, its suffix is one of its content."""
    named = _named(address)
    return next((path for path in (named, *(_beside(named, end) for end in _ENDS)) if path.is_file()), named)


def _named(address: str) -> Path:
    """FILE, by the address alone."""
    name = re.sub(r"[^\w.-]", "_", Path(urlsplit(address).path).name)[-150:].lstrip(".") or "weights.pth"
    stem, suffix = os.path.splitext(name)
    return weights_folder() / f"{stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{suffix}"


def download(address: str, sha256: str | None = None) -> Path:
    """The file of an https address, from the cache where it is there.

    Args:
        address: https; http on this machine alone.
        sha256: of the file, or its first hex digits; without, the first download's is remembered.

    Raises:
        InputError: one sentence with what to do: no network, no such file, no right to it, a web page instead of a
            file, no weights, damaged ones, no room, another file than was expected.
    """
    _check_address(address)
    if (path := _cached(address, sha256)) is not None:  # the folder may be one that is only read
        return path
    from huggingface_hub.utils import WeakFileLock

    named = _named(address)
    try:
        named.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(_beside(named, ".lock")):
            path = _cached(address, sha256) or _repaired(cached_path(address), named)  # another process may be first
            return path or _bring(address, named, sha256)
    except OSError as error:
        raise InputError(no_room(named.parent, CACHE_VARIABLE, error)) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def no_room(folder: Path, variable: str, error: OSError) -> str:
    """Why a folder of downloads cannot be written, in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{folder}: no room is left for the weights ({error.strerror}): free some, or choose another folder by the "
            f"environment variable {variable}"
        )
    return (
        f"{folder}: the weights cannot be written there ({error.strerror or error}): choose another folder by the "
        f"environment variable {variable}"
    )


def shown(address: str) -> str:
    """An address for a screen, without what may be a secret in it."""
    parts = urlsplit(address)
    return one_line(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl())


def _cached(address: str, sha256: str | None) -> Path | None:
    """The file of an address, where it is in the cache and can be read."""
    path = cached_path(address)
    if not path.is_file():
        return None
    _check_cached(path, address, sha256)
    try:
        read_file(path)
    except InputError:
        return None
    return path


def _repaired(path: Path, named: Path) -> Path | None:
    """The file in the cache under the name that it should have; gone, with what is remembered of it, where it is no
    weights. Earlier versions kept whatever came, as it was called."""
    if not path.is_file():
        return None
    try:
        return _put(path, named, suffix_of_content(path))
    except InputError:
        path.unlink()
        _beside(named, ".json").unlink(missing_ok=True)
        return None


def _put(path: Path, named: Path, suffix: str) -> Path:
    """Move a file, whose content has this suffix, to its place in the cache."""
    fits = named.suffix == suffix or (suffix == ".pth" and named.suffix not in ("", ".safetensors"))
    place = named if fits else _beside(named, suffix)
    os.replace(path, place)
    return place


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", address):
        raise InputError(f"{one_line(address)}: expected an address such as https://HOST/PATH/FILE")
    if parts.scheme == "http" and parts.hostname not in _LOCAL_HOSTS:
        raise InputError(
            f"{shown(address)}: anybody on the way can change what comes by http: give an https address, or download "
            "the file yourself and give it"
        )


def _check_cached(path: Path, address: str, sha256: str | None) -> None:
    digest = sha256_of(path)
    for expected in (sha256, _record(_named(address)).get("sha256")):
        if isinstance(expected, str) and not digest.startswith(expected):
            raise InputError(
                f"{path}: its bytes are not those that came from {shown(address)} (sha256 {digest[:16]}..., expected "
                f"{one_line(expected[:16])}...): delete the file, and it is downloaded again"
            )


def _record(path: Path) -> dict[str, Any]:
    """What is remembered of a file; empty where nothing is."""
    try:
        content = parse_json(read_text(_beside(path, ".json"), MAX_RUN_BYTES), path.name)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _bring(address: str, named: Path, sha256: str | None) -> Path:
    """The file of an address in its place; what was there of it before is gone on with."""
    part, remembered = _beside(named, ".part"), _record(named)

    def remember(**what: Any) -> None:
        remembered.update(what, address=shown(address))
        write_text(_beside(named, ".json"), json.dumps(remembered, indent=1) + "\n")

    with console.reading(f"downloading {one_line(named.name)}", "MB") as update:
        _transfer(address, part, remembered, remember, update)
    digest = sha256_of(part)
    if sha256 is not None and not digest.startswith(sha256):
        part.unlink()
        raise InputError(
            f"{shown(address)}: what came is not the published file (sha256 {digest[:16]}..., expected {sha256}...): "
            "nothing of it was kept. Try again; if it stays so, take the file from its authors and give that"
        )
    try:
        suffix = suffix_of_content(part)
    except InputError as error:
        part.unlink()
        reason = str(error).removeprefix(f"{part}: ").removesuffix(f". {COPY_AGAIN}")
        raise InputError(
            f"{shown(address)}: {reason}. Nothing of it was kept: try again; if it stays so, give another address or "
            "the file itself"
        ) from error
    before = remembered.get("sha256")
    if isinstance(before, str) and digest != before:
        part.unlink()
        raise InputError(
            f"{shown(address)}: the file there has changed since it was first downloaded (sha256 {digest[:16]}..., "
            f"then {one_line(before[:16])}...): nothing of it was kept. If you trust the new one, delete "
            f"{_beside(named, '.json')}"
        )
    remember(sha256=digest, size=part.stat().st_size)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    return _put(part, named, suffix)


def _transfer(
    address: str,
    part: Path,
    remembered: dict[str, Any],
    remember: Callable[..., None],
    update: Callable[[int, int], None],
) -> None:
    """Fill `part`, in as many tries as it takes; each goes on where the one before was cut."""
    tries, wait = 0, WAIT_SECONDS
    furthest = part.stat().st_size if part.exists() else 0
    begins_anew = False  # a server that cannot go on, and cuts each time, would do so without end
    while True:
        had = part.stat().st_size if part.exists() else 0
        validator = remembered.get("validator")
        if had and not isinstance(validator, str):  # nothing would tell whether the rest is of the same file
            part.unlink()
            had, begins_anew = 0, True
        try:
            with _answer(address, had, validator) as answer:
                if answer is None:  # `part` was longer than the file, or is all of it
                    if had == remembered.get("size"):
                        return
                    part.unlink()
                    continue
                is_rest = answer.status_code == 206
                begins_anew = not is_rest if had else begins_anew
                total = _total(answer, had if is_rest else 0)
                _check_size(address, total, had if is_rest else 0, part)
                remember(validator=answer.headers.get("etag") or answer.headers.get("last-modified"), size=total)
                try:
                    _write(address, answer, part, is_rest=is_rest, total=total, update=update)
                except InputError:
                    part.unlink(missing_ok=True)
                    raise
                return
        except _Cut as cut:
            now = part.stat().st_size if part.exists() else 0
            if now > furthest:
                tries, wait, furthest = 0, WAIT_SECONDS, now
            tries += 1
            if tries >= MOST_TRIES or not cut.may_pass:
                kept = f" after {now:,} bytes, which are kept for the next try" if now else ""
                if now and begins_anew:
                    part.unlink()
                    kept = f"; the server begins each try anew, and none got further than {furthest:,} bytes"
                raise InputError(
                    f"{shown(address)} cannot be downloaded ({cut}){kept}: try again later. {_BY_HAND}"
                ) from cut
            time.sleep(wait)
            wait *= 2


class _Cut(Exception):
    """The network failed, for now or (`may_pass` is False) until somebody does something."""

    def __init__(self, reason: str, *, may_pass: bool = True):
        super().__init__(reason)
        self.may_pass = may_pass


@contextmanager
def _answer(address: str, had: int, validator: Any) -> Iterator[Any]:
    """The answer of the server, behind all redirects, of which only the head is read so far; None where nothing follows
    the `had` bytes that are there."""
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    headers = {"Accept-Encoding": "identity"}
    if had:
        headers |= {"Range": f"bytes={had}-", "If-Range": validator}
    url = address
    try:
        for _ in range(MOST_REDIRECTS):
            with get_session().stream(
                "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=False
            ) as answer:
                if not answer.has_redirect_location:
                    yield None if answer.status_code == 416 and had else _accepted(address, answer, had)
                    return
                url = str(answer.url.join(answer.headers["location"]))
                _check_redirect(address, url)
    except OfflineModeIsEnabled:
        raise InputError(
            f"{shown(address)} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it. {_BY_HAND}"
        ) from None
    except HTTPError as error:
        raise _Cut(one_line(f"{type(error).__name__}: {error}".rstrip(": "))) from error
    raise InputError(f"{shown(address)} leads from one address to the next without end: give another one")


def _check_redirect(address: str, target: str) -> None:
    try:
        _check_address(target)
    except InputError:
        raise InputError(
            f"{shown(address)} leads to {shown(target)}, which is no https address: it was not followed. Give another "
            "address, or download the file yourself and give it"
        ) from None
    if urlsplit(target).scheme == "http" and urlsplit(address).scheme == "https":
        raise InputError(f"{shown(address)} leads from https to {shown(target)}: it was not followed")


def _accepted(address: str, answer: Any, had: int) -> Any:
    """The answer where it is the file or the rest of it."""
    status, place = answer.status_code, shown(address)
    if status in (401, 403):
        raise InputError(
            f"{place}: the server wants a login, or forbids the download ({status}): download it in a browser, and "
            "give the file itself"
        )
    if status in (404, 410):
        raise InputError(f"{place}: there is no such file on the server ({status}): look for its new address")
    if status in (408, 425, 429) or status >= 500:
        raise _Cut(f"the server answers {status}")
    if status not in (200, 206):
        raise InputError(f"{place}: expected a file, but the server answers {status}: give the address of the file")
    if status == 206 and not answer.headers.get("content-range", "").startswith(f"bytes {had}-"):
        raise _Cut("the server sends another part of the file than it was asked for", may_pass=False)
    if answer.headers.get("content-type", "").lower().startswith("text/html"):
        raise _web_page(address)
    return answer


def _web_page(address: str) -> InputError:
    return InputError(
        f"{shown(address)}: expected a file of weights, got a web page, such as a login or a question whether to go on "
        "(Google Drive asks so for large files): download the file in a browser, and give it"
    )


def _total(answer: Any, had: int) -> int | None:
    """Bytes of the whole file; None where the server does not say."""
    length = answer.headers.get("content-length", "")
    if answer.headers.get("content-encoding", "identity") != "identity" or not length.isdigit():
        return None
    return had + int(length)


def _check_size(address: str, total: int | None, had: int, part: Path) -> None:
    if total is None:
        return
    if total > MAX_WEIGHT_BYTES:
        raise InputError(f"{shown(address)}: expected at most {MAX_WEIGHT_BYTES:,} bytes of weights, it has {total:,}")
    free = shutil.disk_usage(part.parent).free
    if total - had > free:
        raise OSError(errno.ENOSPC, f"{(total - had) / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")


def _write(
    address: str, answer: Any, part: Path, *, is_rest: bool, total: int | None, update: Callable[[int, int], None]
) -> None:
    """The body of an answer behind what is there of the file, or in its place."""
    from huggingface_hub.errors import HTTPError

    chunks = answer.iter_bytes(_CHUNK)
    with part.open("ab" if is_rest else "wb") as file:
        while True:
            try:
                chunk = next(chunks, b"")
            except HTTPError as error:
                raise _Cut(one_line(f"the connection was cut: {error}".rstrip(": "))) from error
            if not chunk:
                break
            if file.tell() == 0 and re.match(rb"\s*<(!doctype\s+html|html)", chunk[:200], re.IGNORECASE):
                raise _web_page(address)
            file.write(chunk)
            if file.tell() > MAX_WEIGHT_BYTES:
                raise InputError(f"{shown(address)}: expected at most {MAX_WEIGHT_BYTES:,} bytes of weights, got more")
            update(file.tell() // 10**6, (total or 0) // 10**6 or 1)
        if total is not None and file.tell() != total:
            raise _Cut(f"{file.tell():,} of {total:,} bytes came")
