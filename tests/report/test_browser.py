"""The pages in a real browser: every section is seen, in light and dark and on a phone, and nothing complains."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddetr.datasets.config import DataConfig, PageConfig
from ddetr.datasets.splits import load_splits
from ddetr.report import RunFiles, data_page, write_report
from ddetr.report.data_page import write_data_page
from ddetr.report.page import SECTIONS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed"),
]

# Runs in a copy of the page whose policy allows it, after everything is laid out.
MEASURE = """<script>
addEventListener("load", () => {
  const seen = {};
  for (const section of document.querySelectorAll("section")) {
    const box = section.getBoundingClientRect();
    seen[section.id] = [box.width, box.height, section.innerText.length].map(Math.round);
  }
  const root = document.documentElement;
  const broken = [...document.images].filter(one => !(one.complete && one.naturalWidth)).length;
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify({seen, overflow: root.scrollWidth - root.clientWidth, broken});
  document.body.append(result);
});
</script>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess:
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_section_of_a_report_is_seen(run_folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    look_at(write_report(RunFiles.read(run_folder)), SECTIONS, tmp_path, width, dark)


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_section_of_a_data_page_is_seen(drawn_coco: Path, tmp_path: Path, width: int, dark: bool) -> None:
    data = DataConfig(str(drawn_coco), image_size=64)
    page = tmp_path / "data.html"
    assert write_data_page(page, *load_splits(data), data, PageConfig()) == []
    look_at(page, data_page.SECTIONS, tmp_path, width, dark)


def look_at(page: Path, sections: dict[str, str], tmp_path: Path, width: int, dark: bool) -> None:
    """Every section is seen, and the console is quiet."""
    size = f"--window-size={width},3000"
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    picture = tmp_path / "page.png"
    shot = browse(page, tmp_path / "profile", size, f"--screenshot={picture}", *scheme)
    assert not re.findall(r"CONSOLE.*", shot.stderr)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert (pixels.mean() < 100) == dark
    assert pixels.std() > 5

    # the same page, able to measure itself
    text = page.read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src"
    assert text.count(policy) == 1
    copy = page.with_name("measured.html")
    copy.write_text(
        text.replace(policy, "default-src 'none'; script-src 'unsafe-inline'; style-src") + MEASURE, encoding="utf-8"
    )
    done = browse(copy, tmp_path / "profile2", size, "--dump-dom", "--virtual-time-budget=5000", *scheme)
    assert not re.findall(r"CONSOLE.*", done.stderr)
    measured = _measured(done.stdout)
    assert list(measured["seen"]) == list(sections)
    for section, (shown_width, height, length) in measured["seen"].items():
        assert shown_width > 0.9 * min(width, 1100), section
        assert height > 60, section
        assert length > 30, section
    assert measured["overflow"] <= 0, "the page is wider than the window"
    assert measured["broken"] == 0


def _measured(dom: str) -> dict[str, Any]:
    class Reader(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = ("id", "measured") in attrs

        def handle_data(self, data: str) -> None:
            self.text += data if self.inside else ""

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    reader = Reader()
    reader.feed(dom)
    return json.loads(reader.text)
