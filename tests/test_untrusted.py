"""Files and names that others made: what is opened, parsed, shown."""

import os
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddetr.arrays import check_tensors
from ddetr.errors import InputError
from ddetr.printable import csv_cell, one_line, printable, shortened
from ddetr.untrusted import MAX_YAML_VALUE, open_file, parse_json, parse_yaml, read_bytes, read_text


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "file", 100) == "a\nb\nc\n"
    with open_file(tmp_path / "file") as file:
        assert len(file.read()) == 10
    with pytest.raises(OSError, match="it has 0 MB, more than"):
        read_bytes(tmp_path / "file", 8)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    for name, kind in (("pipe", "a named pipe"), ("link", "a device"), ("socket", "a socket"), (".", "a folder")):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            read_bytes(tmp_path / name, 100)
    with pytest.raises(OSError, match="more than its stated size"):  # it says 0 bytes, and has some
        read_bytes("/proc/self/status", 100)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing", 100)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "more than 250,000 values"),
        ("a: &a {k: 1}\nb: &b {<<: [" + "*a, " * 500 + "]}\nc: &c {<<: [" + "*b, " * 500 + "]}", "more than 250,000"),
        ("[" * 2000, "more than 50 levels"),
        ("a: &a [*a]", "line 1 holds a value that contains itself"),
        ("nc: " + "9" * 5000, "broken YAML: a value cannot be read"),
        ("date: 2020-99-99", "broken YAML: a value cannot be read"),
        ("date: !!timestamp soon", "broken YAML: a value cannot be read"),
        ("is: !!bool maybe", "broken YAML: a value cannot be read"),
        ("names: ['" + "a" * (MAX_YAML_VALUE + 1) + "']", "line 1 holds a value of 10,001 characters"),
        ("run: !!python/object/apply:os.system [true]", "broken YAML at line 1"),
        ("a: *b", "undefined alias"),
        ("a: \x00", "broken YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_no_document_for_us(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_yaml(text, "some.yaml")
    assert str(caught.value).startswith("some.yaml")


def test_yaml_with_a_few_aliases_is_read() -> None:
    text = "base: &base {lr: 1, names: &n [a, b]}\nmore: {<<: *base, lr: 2}\nagain: [*n, *n]\nnothing:\n"
    assert parse_yaml(text, "") == {
        "base": {"lr": 1, "names": ["a", "b"]},
        "more": {"lr": 2, "names": ["a", "b"]},
        "again": [["a", "b"]] * 2,
        "nothing": None,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested"),
        ('{"a": ' * 100_000, "nested"),
        ("1" * 5000, "can't be read: Exceeds the limit"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": 1,\n "a" 2}', "broken JSON: Expecting ':' delimiter at line 2, column 6"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_no_document_for_us(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_json(text, "some.json")
    assert parse_json('{"a": 1, "a": 1}', "") == {"a": 1}


def test_tensors_hold_what_they_show() -> None:
    whole = torch.zeros(4, 5)
    check_tensors({"a": whole, "b": [whole.T, whole[:2], ("text", {"c": torch.nn.Parameter(whole)})]}, 200)
    wrong: dict[str, Callable[[], torch.Tensor]] = {
        "holds fewer": lambda: torch.zeros(1).expand(2**40),
        "no plain tensor": lambda: torch.eye(3).to_sparse(),
        "in memory": lambda: torch.zeros(3, device="meta"),
        "than the file has room for": lambda: torch.zeros(51),
    }
    for said, make in wrong.items():
        with pytest.raises(ValueError, match=said):
            check_tensors([{"x": make()}], 200)
    with pytest.raises(ValueError, match="32 times"):
        check_tensors([whole.view(20)[i:] for i in range(1) for _ in range(40)], 200)
    endless: list = []
    endless.append(endless)
    check_tensors(endless, 0)


def test_nothing_that_a_terminal_obeys_is_printable() -> None:
    assert printable("Ärger 犬 \N{DOG FACE} tab\there\n") == "Ärger 犬 \N{DOG FACE} tab\there\n"
    assert printable("a\x1b[2Jb\u202ec\x9bd\ud800e\u200bf\rg") == r"a\x1b[2Jb\u202ec\x9bd\ud800e\u200bf\rg"
    for code in [*range(0x300), *range(0x2000, 0x2100), *range(0xD800, 0xE000), *range(0xFE00, 0x10000), 0xE0041]:
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and chr(code) not in "\n\t":
            assert printable(chr(code)).startswith("\\"), hex(code)


@pytest.mark.parametrize(
    "name",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian
        "\u0915\u094d\u200d\u0937",  # Hindi, after a virama
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family
        "\U0001f469\U0001f3fd\u200d\u2695\ufe0f",  # a doctor with a skin tone
        "\u2764\ufe0f\u200d\U0001f525",  # a heart on fire
    ],
)
def test_joiners_inside_words_and_emoji_stay(name: str) -> None:
    assert one_line(name) == printable(f"a {name} b")[2:-2] == name


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
def test_joiners_that_only_hide_are_spelled_out(joiner: str) -> None:
    shown = joiner.encode("unicode_escape").decode()
    letter = "\u0645"
    for text in (
        "pass{}word",
        f"{letter}{{}}",
        f"{{}}{letter}",
        f"{letter}{{}} {letter}",
        f"a{{}}{letter}",
        "^{}\u2695",
    ):
        assert printable(text.format(joiner)) == text.format(shown)
    assert printable(f"{letter}{joiner * 2}{letter}") == f"{letter}{shown * 2}{letter}"


def test_long_texts_lose_their_middle() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("a" * 10 + "b" * 90, 10) == "aaaaa... (90 characters) ...bbbbb"
    assert one_line("two\nlines\tand \x1b") == r"two\nlines\tand \x1b"
    assert len(one_line("x" * 5_000_000)) < 300


def test_cells_are_no_formulas() -> None:
    assert [csv_cell(value) for value in ("=1+1", "+a", "-b", "@c", "\td", "\re")] == [
        *("'=1+1", "'+a", "'-b", "'@c", "'\td", "'\re")
    ]
    for value in ("a=b", "-1.5", "+3", "-inf", "", -1.5, None, "'=x"):
        assert csv_cell(value) is value
