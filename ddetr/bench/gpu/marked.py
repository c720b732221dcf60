"""Stage 7: the project's tests that need a GPU."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import ddetr
from ddetr.bench.gpu.sheet import Place, Sheet

_MARK = re.compile(r"pytest\.mark\.gpu|^pytestmark = .*\bgpu\b", re.MULTILINE)


def run(sheet: Sheet, place: Place) -> None:
    """The stage; where there is no GPU the tests are collected and skip themselves."""
    if find_spec("pytest") is None:
        sheet.skip("tests", "pytest is not installed")
        return
    root = next((path for path in (Path(ddetr.__file__).parents[1], Path.cwd()) if (path / "tests").is_dir()), None)
    if root is None:
        sheet.skip("tests", "no folder tests beside the package or here: run it where the source is")
        return
    files = [path for path in sorted((root / "tests").rglob("test_*.py")) if _MARK.search(path.read_text("utf-8"))]
    results = place.scratch / "results.xml"
    # Each test is told as it ends; what another version of PyTorch warns of is no failure of ours.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "default", f"--junitxml={results}"]
    command += ["-p", "no:cacheprovider"]
    if place.on_gpu and find_spec("xdist"):
        command += ["-n", "8"]  # most of their time they compile
    command += ["--basetemp", str(place.scratch / "pytest"), *map(str, files)]
    try:
        # cuBLAS looks at the variable when it starts; the deterministic tests need it, whoever comes first.
        env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        timeout = max(sheet.left() - 2, 5)
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode("utf-8", "replace")
        for line in said.splitlines():
            if "FAILED" in line or "ERROR" in line:
                sheet.check(line.strip(), False)
        sheet.skip("the other tests", f"time was up when {len(re.findall('PASSED', said))} had passed")
        return
    sheet.data["output"] = done.stdout[-4000:]
    if not results.exists():
        sheet.check("the tests run", False, (done.stdout + done.stderr).strip()[-300:])
        return
    cases = list(ET.parse(results).getroot().iter("testcase"))
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    for case in wrong:
        found = case.find("failure") if case.find("failure") is not None else case.find("error")
        sheet.check(f"{case.get('classname')}::{case.get('name')}", False, (found.get("message") or "")[:300])
    passed = len(cases) - len(wrong) - len(skipped)
    if passed:
        sheet.check(f"{passed} tests marked gpu pass", not wrong, f"{len(skipped)} skipped")
        return
    reason = "none was collected" if not cases else f"all {len(skipped)} skip themselves"
    if place.on_gpu:
        sheet.check("the tests marked gpu run", False, f"{reason}: {done.stdout.strip()[-200:]}")
    else:
        sheet.skip("tests", f"there is no GPU: {reason}")
