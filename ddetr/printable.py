"""What of a text that others made reaches a screen, a page or a table."""

import re
import unicodedata
from typing import Any

SHOWN_NAME = 200  # characters of a name on a screen, in a page, in a table

# What moves the cursor, changes colours, turns the writing direction, is invisible, or is half a character: controls
# (but tab and newline), format characters, line separators, surrogates (bytes of a file name that are no UTF-8).
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)

_JOINERS = "\u200c\u200d"  # Persian and Indic words need them, and emoji of several parts
_BEFORE_JOINER = ("Lo", "Mn", "Mc", "So")  # letters of scripts without capitals, their signs, emoji
_AFTER_JOINER = ("Lo", "So")
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def printable(text: str) -> str:
    """The text with everything that would do something to a screen, or hide there, spelled out: ESC is `\\x1b`.

    A joiner inside a Persian or Indic word or an emoji stays; elsewhere, or doubled, it does nothing but hide.
    """
    return _UNSAFE.sub(_spelled_out, text)


def _spelled_out(found: re.Match[str]) -> str:
    text, start, end = found.string, found.start(), found.end()
    if found[0] in _JOINERS and start > 0 and end < len(text):
        before, after = text[start - 1], text[end]
        joins = before in _SKIN_TONES or unicodedata.category(before) in _BEFORE_JOINER
        if joins and unicodedata.category(after) in _AFTER_JOINER:
            return found[0]
    return found[0].encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than about `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}... ({len(text) - 2 * half:,} characters) ...{text[-half:]}"


def one_line(text: object, most: int = SHOWN_NAME) -> str:
    """A name or a sentence for a screen: short, and on one line."""
    return printable(shortened(str(text), most)).replace("\n", "\\n").replace("\t", "\\t")


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets a `'` before it. Numbers, also
    those in text, stay."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"
