"""Imports go down (design): a module imports from lower floors or its own part; each heavy package has one home."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import ddetr

ROOT = Path(ddetr.__file__).parent
FLOORS = {
    0: "errors",
    1: "wording files console padding boxes ops",
    2: "runtime",
    3: "datasets models",
    4: "checkpoint evaluation doctor",
    5: "inference",
    6: "report",
    7: "engine",
    8: "demo",
    9: "bench",
    10: "cli",
    11: "__main__ __init__",
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts.split()}
HEAVY = {
    *("timm", "scipy", "lightning", "jsonargparse", "matplotlib", "fastapi", "onnx", "transformers", "supervision"),
    *("hotcoco", "faster_coco_eval", "pycocotools", "jinja2", "markupsafe"),
}


def imports() -> Iterator[tuple[str, str, str]]:
    """(part that imports, "file:line", dotted name) for every import, wherever in the file it stands."""
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                yield part, f"{path.relative_to(ROOT.parent)}:{node.lineno}", name


def test_modules_import_from_lower_floors_only() -> None:
    wrong = []
    for part, where, name in imports():
        assert part in FLOOR_OF, f"{where}: give {part!r} a floor in FLOORS"
        imported = name.split(".")[1] if name.startswith("ddetr.") else part
        if imported not in (part, "__version__") and FLOOR_OF[imported] >= FLOOR_OF[part]:
            wrong.append(f"{where}: {part} (floor {FLOOR_OF[part]}) imports {imported} (floor {FLOOR_OF[imported]})")
    assert not wrong, "\n".join(wrong)


def test_each_heavy_package_has_one_home() -> None:
    homes = defaultdict(set)
    for part, _, name in imports():
        if name.split(".")[0] in HEAVY:
            homes[name.split(".")[0]].add(part)
    assert {package: parts for package, parts in homes.items() if len(parts) > 1} == {}


def test_importing_the_package_is_light() -> None:
    code = "import sys, ddetr; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY.union({"torch", "torchvision"}) & set(loaded)
