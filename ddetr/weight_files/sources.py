"""A name, a hub id, an address or a path -> weights on this machine."""

import re
from pathlib import Path

from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.printable import one_line
from ddetr.weight_files.catalogue import Entry, catalogue
from ddetr.weight_files.download import cached_path, download, sha256_of
from ddetr.weight_files.folders import weights_file
from ddetr.weight_files.hub import SUFFIXES, HubPlace, find_on_hub, hub_place, is_on_disk
from ddetr.wording import did_you_mean

_FORMS = "a name of `ddetr weights list`, a hub id (org/name), an https address or a file"


def find_weights(source: str | Path) -> Path:
    """The file, or the folder of a hub repository, that `source` means; downloaded where it is not on this machine.

    Args:
        source: in the order of what it may mean: a path that is there; a name of the catalogue; ORG/NAME of the hub,
            with @REVISION and /FILE where wanted, also behind hf://; an https address.

    Raises:
        InputError: there is no such thing, or it cannot be had: one sentence with what to do.
    """
    text = str(source)
    path = Path(text).expanduser()
    if _is_there(path):
        return path
    if isinstance(source, Path):
        return existing(path)
    entry = catalogue().get(text)
    address = text if entry is None else entry.address
    is_address = re.match(r"https?://|hf://", address) is not None
    place = hub_place(address)
    if not is_address and _means_a_path(text):
        return _missing(path, place)
    if place is not None:
        return find_on_hub(place)
    if is_address and not address.startswith("hf://"):
        return download(address, None if entry is None else entry.sha256)
    hint = did_you_mean(text, catalogue())
    raise InputError(f"{one_line(text)}: expected {_FORMS}, but there is nothing of this name{hint}")


def is_public(source: str) -> bool:
    """Whether a source means the same on other machines too: it is no path on this one."""
    return not _is_there(Path(source).expanduser())


def is_cached(entry: Entry) -> bool:
    """Whether the weights of an entry are on this machine."""
    place = hub_place(entry.address)
    return cached_path(entry.address).is_file() if place is None else is_on_disk(place)


def fingerprint(path: Path) -> str:
    """The sha256 of the file of weights that a path means, in hex digits; of weights in several files that of their
    index."""
    return sha256_of(weights_file(path))


def _missing(path: Path, place: HubPlace | None) -> Path:
    """Raises `InputError` with the nearest name that is there."""
    try:
        return existing(path)
    except InputError as error:
        if place is None or place.path or place.repo.endswith(SUFFIXES):
            raise
        raise InputError(f"{error}; the repository of the hub is hf://{place}") from None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # names that no file can have
        return False


def _means_a_path(text: str) -> bool:
    """Whether a text without a scheme is rather a path with a mistake than ORG/NAME."""
    first, *others = re.split(r"[/\\]", text)
    return (
        first in ("", ".", "..", "~")
        or "\\" in text
        or re.match(r"[A-Za-z]:", text) is not None
        or (bool(others) and _is_there(Path(first)))
        or (len(others) < 2 and text.endswith(SUFFIXES))
    )
