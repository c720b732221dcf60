"""Figures as files: without a display, without pyplot's global state, whole or absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def png_figure(path: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw into; `path` is written when the block ends without an error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))
