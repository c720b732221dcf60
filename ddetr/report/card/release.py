"""The folder that is published of a run: weights, configuration, model card, curves, on request pictures."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddetr.checkpoint import Checkpoint, build_from_checkpoint, load_checkpoint, save_checkpoint
from ddetr.checkpoint.transformers_folder import preprocessor_config
from ddetr.errors import InputError
from ddetr.files import write_folder_atomically, write_text
from ddetr.printable import one_line
from ddetr.report.card.model_card import model_card
from ddetr.report.curves import draw_curves
from ddetr.report.run_files import RunFiles

MOST_PICTURES = 12


def write_release(run_path: Path, folder: Path, repo: str, licence: str, *, pictures: bool = False) -> list[Path]:
    """Write what is published of a run.

    Args:
        run_path: the run folder.
        folder: new, or empty.
        repo: "org/name" that it is meant for.
        licence: what others may do with the weights, as the hub names it: apache-2.0, cc-by-4.0, other, ...
        pictures: show images of the validation, as far as the run has drawn any.

    Returns:
        The files.

    Raises:
        InputError: no run folder, one without a checkpoint, a damaged checkpoint; no such licence; a folder that holds
            something.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", licence):
        raise InputError(
            f"--license: expected the hub's name of a licence, such as apache-2.0, mit, cc-by-4.0 or other, got "
            f"{one_line(licence)!r}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already: choose a new folder with --output")
    run = RunFiles.read(run_path)
    checkpoint, which = _published(run_path)
    build_from_checkpoint(checkpoint)  # what cannot be loaded is not published
    drawn = sorted(path for path in (run_path / "pictures").glob("*.png") if path.is_file() and not path.is_symlink())

    def write(place: Path) -> None:
        save_checkpoint(place / "model.safetensors", checkpoint)
        write_text(place / "config.json", _json(_config(checkpoint)))
        write_text(place / "preprocessor_config.json", _json(preprocessor_config(checkpoint.input)))
        curves = draw_curves(replace(run, path=place))
        shown = []
        for number, picture in enumerate(drawn[:MOST_PICTURES] if pictures else [], 1):
            shown.append(f"picture-{number:02}.png")  # names of images may say more than the images
            shutil.copyfile(picture, place / shown[-1])
        metrics = run.metrics.get(which)
        card = model_card(run, checkpoint, metrics, repo, licence, has_curves=curves is not None, pictures=shown)
        write_text(place / "README.md", card)

    write_folder_atomically(folder, write)
    return sorted(folder.iterdir())


def _published(run_path: Path) -> tuple[Checkpoint, str]:
    """The best checkpoint, or the last where that alone is there; and which of the two it is."""
    for which in ("best", "last"):
        if (run_path / f"{which}.pth").is_file():
            return load_checkpoint(run_path / f"{which}.pth"), which
    raise InputError(f"{run_path} holds no best.pth or last.pth: they come with the first validation of a run")


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """For readers and for `PyTorchModelHubMixin`: the constructor's arguments at the top. The weights hold all of it
    too, and are what ddetr reads."""
    return {
        **checkpoint.config,
        "id2label": {str(label): category.name for label, category in enumerate(checkpoint.categories)},
        "category_ids": [category.category_id for category in checkpoint.categories],
        "input": checkpoint.input,
        "threshold": checkpoint.threshold,
        "ddetr_version": checkpoint.ddetr_version,
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
