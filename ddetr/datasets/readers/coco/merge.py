"""Several COCO files of one split, its parts or one for each image, to the content of one.

Each file says what its ids mean: where those of two files don't agree, classes are known by their names, and images are
numbered anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders
from ddetr.datasets.readers.coco.content import NotCoco, categories_of, entries_of, load_json, whole_number
from ddetr.datasets.readers.coco.ids import is_id
from ddetr.datasets.readers.coco.layout import image_dirs
from ddetr.datasets.readers.file_names import choose_home
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_PATH
from ddetr.wording import first_few

_COMPARED = 100  # images of one name in several folders, whose content is compared


@dataclass(frozen=True)
class _Part:
    """The content of a file."""

    name: str
    images: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    names: Mapping[int, str]  # category id -> name
    file: Path


def merged(files: Sequence[Path], root: Path, log: FindingLog, shown: str) -> dict[str, Any]:
    """One content with the images, objects and categories of all files; what contradicts goes to the log.

    root: the data set's folder, from which on images are named where the files lie in different folders.

    Raises:
        InputError: none of them can be read.
    """
    parts, broken, folders = [], [], ImageFolders()
    apart = len({file.parent for file in files}) > 1
    for file in files:
        name = str(file.relative_to(root)) if apart else file.name
        try:
            parts.append(_read(file, name, log))
            if apart:
                _name_from(root, file, parts[-1].images, folders)
        except NotCoco:
            log.add("other-json", "note", name, 'It has no "images": it is no annotation of any.')
        except InputError as error:
            broken.append((name, error))
    if not parts:
        raise broken[0][1] if broken else NotCoco(f"{shown}: none of them is a COCO annotation file")
    is_one_image_each = all(len(part.images) < 2 for part in parts)
    for name, error in broken:
        message = f"It can't be read ({error}); {'its image was' if is_one_image_each else 'its images were'} left out."
        log.add("malformed-json", "dropped" if is_one_image_each else "refused", name, message)
    if not is_one_image_each:
        _report_overlap(parts, log, shown, root)
    ids_of_images, ids_of_classes, categories = _image_ids(parts, log, shown), *_class_ids(parts, log, shown)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for place, part in enumerate(parts):
        for image in part.images:
            if ids_of_images:
                image["id"] = _mapped(ids_of_images[place], image.get("id"), part)
            content["images"].append(image)
        alone = part.images[0].get("id") if len(part.images) == 1 else None
        for obj in part.objects:
            if "image_id" not in obj and alone is not None:
                obj["image_id"] = alone
            elif ids_of_images:
                obj["image_id"] = _mapped(ids_of_images[place], obj.get("image_id"), part)
            if ids_of_classes:
                obj["category_id"] = _mapped(ids_of_classes[place], obj.get("category_id"), part)
            if "id" in obj:
                obj["id"] = f"{part.name}:{one_line(obj['id'], 40)}"
            content["annotations"].append(obj)
    return content


def _read(file: Path, name: str, log: FindingLog) -> _Part:
    content = load_json(file, log)
    objects = entries_of(content, "annotations", file) if "annotations" in content else []
    own = categories_of(content, [], log, name)[0] if content.get("categories") else ()
    names = {category.category_id: category.name for category in own}
    return _Part(name, entries_of(content, "images", file), objects, names, file)


def _name_from(root: Path, file: Path, images: Sequence[dict[str, Any]], folders: ImageFolders) -> None:
    """Gives the images that lie by their file a name from `root` on: 0/a.jpg and 1/a.jpg of two files' a.jpg."""
    written = (image.get("file_name") for image in images)
    names = [name if isinstance(name, str) and len(name) <= MAX_PATH else "" for name in written]
    home = choose_home(image_dirs(file.parent, file, file.parent.name), list(filter(None, names)), folders)
    for image, name in zip(images, names, strict=True) if home else ():
        found = home.find(name) if name else None
        if found is not None and found.is_relative_to(file.parent):
            image["file_name"] = found.relative_to(root).as_posix()


def _mapped(new_ids: Mapping[Any, int], written: Any, part: _Part) -> Any:
    """The new id; of one that the file doesn't list, a text that no other file has."""
    if not is_id(written):
        return None
    found = new_ids.get(written, new_ids.get(whole_number(written)))
    return f"{one_line(written, 40)} of {part.name}" if found is None else found


def _image_ids(parts: Sequence[_Part], log: FindingLog, shown: str) -> list[dict[Any, int]] | None:
    """Of each file the new id of each image; None where all ids may stay."""
    own = [dict.fromkeys(i for image in part.images if is_id(i := image.get("id"))) for part in parts]
    if len(set().union(*own)) == sum(map(len, own)):
        return None
    message = "Image ids of one file are those of other images in another; the images were numbered from 1."
    log.add("image-ids-repeat", "note", shown, message)
    found, count = [], 0
    for ids in own:
        found.append({written: count + i for i, written in enumerate(ids, 1)})
        count += len(ids)
        found[-1] |= {number: new for i, new in list(found[-1].items()) if (number := whole_number(i)) is not None}
    return found


def _class_ids(
    parts: Sequence[_Part], log: FindingLog, shown: str
) -> tuple[list[dict[int, int]] | None, list[dict[str, Any]]]:
    """Of each file the new id of each category, None where all ids may stay; and the categories of all."""
    pairs = dict.fromkeys(pair for part in parts for pair in part.names.items())
    ids, names = Counter(i for i, _ in pairs), Counter(name for _, name in pairs)
    if max(ids.values(), default=1) == 1 and (max(names.values(), default=1) == 1 or _is_of_one(parts, pairs)):
        return None, [{"id": i, "name": name} for i, name in sorted(pairs)]
    differing = next((i for i, count in ids.items() if count > 1), next(iter(ids)))
    said = first_few(dict.fromkeys(one_line(name, 60) for i, name in pairs if i == differing), 4)
    message = f"The files number their categories differently, such as {differing} ({said})"
    unclear = [part.name for part in parts if part.objects and not part.names]
    doubled = [part.name for part in parts if len(set(part.names.values())) < len(part.names)]
    if unclear or doubled:
        which, why = (unclear, "no categories") if unclear else (doubled, "one name under two ids")
        cure = "what its objects are can't be known. Give all files the same categories."
        log.add("categories-differ", "refused", shown, f"{message}, and {first_few(which, 3)} has {why}: {cure}")
    else:
        log.add("categories-differ", "repaired", shown, f"{message}; classes were matched by their names.")
    new_ids = {name: i for i, name in enumerate(sorted(names), 1)}
    categories = [{"id": i, "name": name} for name, i in new_ids.items()]
    return [{i: new_ids[name] for i, name in part.names.items()} for part in parts], categories


def _is_of_one(parts: Sequence[_Part], pairs: Mapping[tuple[int, str], Any]) -> bool:
    """Whether one file has all the categories, so that a name under two ids is its own matter."""
    return any(part.names.items() >= pairs.keys() for part in parts)


def _report_overlap(parts: Sequence[_Part], log: FindingLog, shown: str, root: Path) -> None:
    """Parts have no images in common; folds and versions of one split do. Equal names in folders of their own are those
    of several images, and become paths from `root`."""
    own = [{str(image.get("file_name")) for image in part.images} for part in parts]
    counts = Counter(name for names in own for name in names)
    shared = [name for name, count in counts.items() if count > 1]
    if not shared:
        return
    folders = [_own_folder(part.file, root) for part in parts]
    if _are_several(own, folders, shared):
        for part, folder in zip(parts, folders, strict=True):
            for image in part.images:
                image["file_name"] = f"{folder.relative_to(root).as_posix()}/{image.get('file_name')}"
        return
    which = [part.name for part, names in zip(parts, own, strict=True) if shared[0] in names]
    message = (
        f"{len(shared):,} of {len(counts):,} images are in several of these files, such as "
        f"{one_line(shared[0])} in {first_few(which, 3)}: are they parts of one split, or versions of it? Name one "
        "file by --data.train_annotations or --data.val_annotations, or take the images out of all but one."
    )
    log.add("parts-overlap", "refused", shown, message, count=len(shared))


def _own_folder(file: Path, root: Path) -> Path | None:
    """The folder of images that is called as an annotation file is."""
    for stem in dict.fromkeys((file.stem, file.stem.removeprefix("instances_"))):
        for place in image_dirs(root, file, stem):
            if place.name == stem and place != root and place.is_relative_to(root):
                return place
    return None


def _are_several(own: Sequence[set[str]], folders: Sequence[Path | None], shared: Sequence[str]) -> bool:
    """Whether names that several files share are those of images of different content, each in its file's folder.

    own: the names in each file; folders: that of each.
    """
    if None in folders or len(set(folders)) < len(folders):
        return False
    for name in shared[:_COMPARED]:
        images = [folder / name for folder, names in zip(folders, own, strict=True) if name in names]
        try:
            if any(cmp(first, second, shallow=False) for first, second in pairwise(images)):
                return False
        except (OSError, ValueError):  # one is not there
            return False
    return True
