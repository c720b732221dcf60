"""Repositories of the Hugging Face hub, or of a server that speaks like it (HF_ENDPOINT). [huggingface_hub]

Its cache, offline mode and tokens are the library's own: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, `hf auth login`.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ddetr import __version__, console
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_RUN_BYTES, MAX_WEIGHT_BYTES
from ddetr.weight_files.download import no_room, sha256_of
from ddetr.weight_files.folders import INDEX_SUFFIX, SINGLE_FILES
from ddetr.wording import did_you_mean, first_few

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # of files of weights
_BESIDE = ("config.json", "preprocessor_config.json")  # what reads such a folder needs beside the weights
_HOSTS = ("huggingface.co", "hf.co")
_NAME = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(rf"({_NAME}/{_NAME})(?:@(refs/[\w.-]+/[\w.-]+|[\w.-]+))?(?:/(.+))?")
_PAGE = re.compile(rf"({_NAME}/{_NAME})(?:/(?:resolve|blob|raw|tree)/(refs/[\w.-]+/[\w.-]+|[^/]+)(?:/(.+))?)?/?")
_TIMEOUT = 30.0  # seconds that the hub may take for a list of files


class HubPlace(NamedTuple):
    """A repository, or a file or a folder in it."""

    repo: str  # "org/name"
    revision: str | None = None  # branch, tag or commit; None for main
    path: str = ""  # of a file or a folder in it; "" for the repository

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return one_line(f"{self.repo}{revision}" + (f"/{self.path}" if self.path else ""))


def hub_place(text: str) -> HubPlace | None:
    """What ORG/NAME[@REVISION][/FILE] means, also behind hf://, or the address of its page; None for other texts."""
    if text.startswith("hf://"):
        found = _PLACE.fullmatch(text.removeprefix("hf://").rstrip("/"))
    elif text.startswith(("https://", "http://")):
        parts, endpoint = urlsplit(text), urlsplit(os.environ.get("HF_ENDPOINT", ""))
        is_hub = parts.hostname in _HOSTS or (endpoint.netloc and parts.netloc == endpoint.netloc)
        found = _PAGE.fullmatch(unquote(parts.path).removeprefix("/")) if is_hub else None
    else:
        found = _PLACE.fullmatch(text)
    if found is None or {".", ".."} & {*re.split("[/@]", text.removeprefix("hf://"))}:
        return None
    return HubPlace(found[1], found[2], found[3] or "")


def find_on_hub(place: HubPlace) -> Path:
    """The file, or the folder with weights and configuration, in the hub's own cache; downloaded where it is not there
    or not the newest. Without the hub, what is in the cache.

    Raises:
        InputError: one sentence with what to do: no network, no such repository or file, no right to it, no room,
            damaged.
    """
    from huggingface_hub import constants

    try:
        files = _listed(place)
    except _Failed as failed:
        there = _in_cache(place)
        if there is None:
            raise InputError(why_not_had(place, failed.error)) from failed.error
        logger.info("%s as it lies in the cache: %s", place, _short(failed.error))
        snapshot, names, wanted = there
        for name in names:
            _check_content(snapshot / name)
        return snapshot / wanted
    names, wanted = _chosen(place, list(files))
    _check_sizes(place, {name: files[name] for name in names})
    try:
        path = _downloaded(place, names, files)
    except _Failed as failed:
        if not is_of_the_hub(failed.error) and getattr(failed.error, "errno", None) is not None:
            raise InputError(no_room(Path(constants.HF_HUB_CACHE), "HF_HOME", failed.error)) from failed.error
        raise InputError(why_not_had(place, failed.error)) from failed.error
    return path / wanted


def is_on_disk(place: HubPlace) -> bool:
    """Whether its weights are in the cache."""
    return _in_cache(place) is not None


class _Failed(Exception):
    """A call of the library did, by the error that it raised."""

    def __init__(self, error: Any):
        super().__init__(str(error))
        self.error = error


@contextmanager
def _asking() -> Iterator[None]:
    """Around calls of the library alone: whatever else is wrong is not the hub."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except InputError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # ids, cards; what hf_xet raises
        raise _Failed(error) from error


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="ddetr", library_version=__version__)


def _listed(place: HubPlace) -> dict[str, int]:
    """Names of all files of the repository, and their bytes."""
    with _asking():
        info = _api().model_info(place.repo, revision=place.revision, files_metadata=True, timeout=_TIMEOUT)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _chosen(place: HubPlace, names: Sequence[str]) -> tuple[list[str], str]:
    """Of the files of a repository those that are needed, the weights last; and the one that was meant, "" or the
    folder where it is a folder.

    Raises:
        InputError: there are no weights, or it is not clear which.
    """
    if place.path in names:
        folder, weights = PurePosixPath(place.path).parent.as_posix(), [place.path]
        folder = "" if folder == "." else f"{folder}/"
        if place.path.endswith(INDEX_SUFFIX):
            weights = [*_shards(place.path, names), place.path]
        return [*(folder + name for name in _BESIDE if folder + name in names), *weights], place.path
    folder = f"{place.path}/" if place.path else ""
    inside = [name for name in names if name.startswith(folder)]
    if folder and not inside:
        raise InputError(f"{place}: the repository has no such file{did_you_mean(place.path, names)}")
    beside = [folder + name for name in _BESIDE if folder + name in names]
    for single in SINGLE_FILES:
        for name in (folder + single, f"{folder}{single}{INDEX_SUFFIX}"):
            if name in names:
                weights = [*_shards(name, names), name] if name.endswith(INDEX_SUFFIX) else [name]
                return [*beside, *weights], place.path
    others = [name for name in inside if name.endswith(SUFFIXES)]
    if len(others) == 1:
        return others, others[0]
    if others:
        raise InputError(
            f"{place}: expected one file of weights, the repository has {len(others)}: say which, as in "
            f"{place.repo}/{one_line(others[0])}; the others are {one_line(first_few(others[1:], 5), 500)}"
        )
    raise InputError(f"{place}: expected weights ({', '.join(SUFFIXES)}), the repository has none there")


def _shards(index: str, names: Sequence[str]) -> list[str]:
    """model.safetensors.index.json -> the model-00001-of-00002.safetensors, ... that are there."""
    stem, suffix = os.path.splitext(index.removesuffix(INDEX_SUFFIX))
    return [name for name in names if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(suffix)}", name)]


def _check_sizes(place: HubPlace, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if name.endswith(".json") and size > MAX_RUN_BYTES:
            raise InputError(f"{place}: {one_line(name)} has {size:,} bytes, more than any configuration")
    if sum(sizes.values()) > MAX_WEIGHT_BYTES:
        raise InputError(
            f"{place}: expected at most {MAX_WEIGHT_BYTES:,} bytes of weights, they have {sum(sizes.values()):,}"
        )


def _downloaded(place: HubPlace, names: Sequence[str], sizes: dict[str, int]) -> Path:
    """The snapshot that holds the files: one commit's, the one that the revision means when the first of them comes."""
    from huggingface_hub import hf_hub_download

    total, done = sum(sizes[name] for name in names), 0
    revision, snapshot = place.revision, Path()
    updates: list[Callable[[int, int], None]] = []
    with ExitStack() as shown:

        def show(count: int) -> None:
            """From the first byte on: of several processes one downloads, and the others wait for it in silence."""
            if not updates:
                updates.append(shown.enter_context(console.reading(f"downloading {place}", "MB")))
            updates[0]((done + count) // 10**6, total // 10**6 or 1)

        for name in names:
            with _asking():
                path = Path(
                    hf_hub_download(
                        place.repo,
                        name,
                        revision=revision,
                        tqdm_class=_bar(show),
                        library_name="ddetr",
                        library_version=__version__,
                    )
                )
            _check_content(path)
            snapshot = path.parents[len(PurePosixPath(name).parts) - 1]
            revision, done = snapshot.name, done + sizes[name]
    return snapshot


def _bar(show: Callable[[int], None]) -> type:
    """What the library takes for a progress bar of tqdm's; `show` is called with the bytes so far, which grow: of the
    bytes that come and those that are on disk, which may have a bar each, it is the larger number."""
    from huggingface_hub.utils import tqdm

    furthest = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            self.count = int(options.get("initial") or 0)
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.count += int(n or 0)
            furthest = max(furthest, self.count)
            show(furthest)

    return Bar


def _check_content(path: Path) -> None:
    """The library names large files by their sha256, and checks no more than their size."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", name) and path.stat().st_size and (digest := sha256_of(path)) != name:
        raise InputError(
            f"{path}: its bytes are not those that were published (sha256 {digest[:16]}..., expected {name[:16]}...): "
            f"delete {path.resolve()}, and it is downloaded again"
        )


def _in_cache(place: HubPlace) -> tuple[Path, list[str], str] | None:
    """The newest snapshot in the cache, and what `_chosen` says of its files; None where a needed one is missing."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=place.repo, repo_type="model"))
    revision = place.revision or constants.DEFAULT_REVISION
    with suppress(OSError, UnicodeDecodeError):  # a commit has no such file
        revision = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / revision
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    try:
        return snapshot, *_chosen(place, names)
    except InputError:
        return None


def is_of_the_hub(error: Any) -> bool:
    """Whether `why_not_had` knows what an error of the library means."""
    from huggingface_hub import errors

    kinds = errors.EntryNotFoundError | errors.FileMetadataError | errors.HTTPError | errors.OfflineModeIsEnabled
    return isinstance(error, kinds | errors.HFValidationError)


def _short(error: Any) -> str:
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def why_not_had(place: HubPlace, error: Any, file: str = "such file") -> str:
    """What an error of the library means for who wants a place of the hub, or a file there that the place does not
    name, and what to do, in a sentence."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # it is not in the cache, and could not be asked for
        error = error.__cause__ or error
    page = f"{constants.ENDPOINT}/{place.repo}"
    by_hand = f"or download it where there is a network ({page}), and give the file itself"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{place}: its owners ask for consent first: accept their conditions on {page}, then log in by "
            "`hf auth login` or the environment variable HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{place}: nothing of this name is here, and the hub has no such repository, or it is private: check the "
            "name; for a private one log in by `hf auth login` or the environment variable HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{place}: the repository has no revision {one_line(place.revision)!r}: see {page}/tree/main"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{place}: the repository has no {file}: see {page}/tree/main"
    if status == 403:
        return f"{place}: the hub forbids it ({status}): take a token (HF_TOKEN, `hf auth login`) that may read it"
    if isinstance(error, errors.HFValidationError):
        return f"{place}: expected a hub id such as org/name ({_short(error)})"
    if constants.HF_HUB_OFFLINE:
        return f"{place} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it, {by_hand}"
    if status is not None:
        reason = f"the hub answers {status}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        reason = "there is no connection to it"
    else:
        reason = _short(error.__cause__ or error)
        reason = f"there is no connection to it: {reason}" if isinstance(error, errors.HTTPError) else reason
    return f"{place} cannot be downloaded from {constants.ENDPOINT} ({reason}): try again, {by_hand}"


def check_repository(repo: str) -> None:
    """Raises `InputError` for what cannot be the id of a repository."""
    if not re.fullmatch(rf"{_NAME}/{_NAME}", repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise InputError(f"{one_line(repo)}: expected a repository on the hub such as org/name")


def upload(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str = "Upload by ddetr"
) -> str:
    """All files of a folder into a repository, in one commit; the repository is made where it is not there.

    Args:
        folder: files, no folders.
        repo: "org/name".
        private: only its owners see it. One that is public already is refused.
        revision: branch, made where it is not there; by default main.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: one sentence: no login, no right, no network.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars

    check_repository(repo)
    api = _api()
    try:
        with _asking():
            api.create_repo(repo, private=True if private else None, exist_ok=True)
            if private and not api.model_info(repo, timeout=_TIMEOUT).private:
                raise InputError(f"{repo} is public already: make it private on its page first, or leave out --private")
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            added = [CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir())]
            disable_progress_bars()  # ours tells that it takes its time
            with console.waiting(f"uploading to {repo}"):
                done = api.create_commit(repo, added, commit_message=message, revision=revision)
    except _Failed as failed:
        raise InputError(_why_not_uploaded(repo, failed.error)) from failed.error
    return str(done.commit_url)


def _why_not_uploaded(repo: str, error: Any) -> str:
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or "token" in str(error).lower() and status is None:
        return (
            f"{repo}: the hub does not know who you are: log in by `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )
    if status in (403, 404):
        return f"{repo}: your token may not write there ({status}): take one that may write, or a repository of yours"
    if constants.HF_HUB_OFFLINE:
        return f"{repo}: HF_HUB_OFFLINE forbids to upload: unset it"
    reason = f"the hub answers {status}: {_short(error)}" if status is not None else _short(error)
    return f"{repo}: nothing was uploaded ({reason}): try again, or upload the folder of --output yourself"
