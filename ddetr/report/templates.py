"""HTML from templates: one look, one file without script, network or anything outside itself.

Jinja2 escapes every value; a Content-Security-Policy in each page (frame.html) forbids scripts and requests should a
value ever get through.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ddetr
from ddetr.printable import one_line, printable
from ddetr.report.charts import shown
from ddetr.untrusted import MAX_PLACE

if TYPE_CHECKING:
    import jinja2

_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: a file of this folder that extends frame.html.
        values: what it shows; of text, what a page can't hold is spelled out.
    """
    page = (
        _environment()
        .get_template(template)
        .render(
            style=(_FOLDER / "style.css").read_text(encoding="utf-8"),
            made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            version=ddetr.__version__,
            **values,
        )
    )
    return printable(page)  # charts and pictures too: what turns the writing direction is never ours


@functools.cache
def _environment() -> jinja2.Environment:
    """Its templates are compiled once: a run writes its report after every validation."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    environment.filters |= {
        "number": _number,
        "score": score,
        "percent": _percent,
        "thousands": _thousands,
        "share": _share,
    }
    return environment


def _finalized(value: Any) -> Any:
    """Of a value that comes into the page as text: what names from outside can be a page can't hold."""
    return one_line(value, MAX_PLACE) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # not NaN; an int may be larger than any float


def _number(value: Any) -> str:
    return shown(float(value)) if _is_number(value) else "-"


def _thousands(value: Any) -> str:
    return f"{value:,}" if _is_number(value) else "-"


def _share(value: Any) -> float:
    return max(0.0, min(1.0, float(value))) if _is_number(value) else 0.0


def score(value: Any) -> str:
    """A metric between 0 and 1; "-" for what is no number."""
    return f"{value:.3f}" if _is_number(value) else "-"


def _percent(value: Any) -> str:
    if not _is_number(value):
        return "-"
    return f"{100 * value:.{0 if value == 0 or value >= 0.1 else 1}f} %"
