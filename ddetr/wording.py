"""Words that many messages share."""

import difflib
from collections.abc import Iterable, Iterator, Sequence


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """ " (did you mean train?)", the tail of an error message: of the known names the nearest ones; "" where none is
    near."""
    if len(word) > 200:  # comparing takes time with the square of the length
        return ""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def first_few(names: Iterable[object], most: int) -> str:
    """ "a, b, c and 4 more"; "nothing" where there are none."""
    shown = [str(name) for name in names]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "nothing") + rest


def plural(count: int, noun: str) -> str:
    """ "1 object" or "1,234 objects"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns under each other, as wide as they are: a table of the terminal would be cut to its width in a file."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
