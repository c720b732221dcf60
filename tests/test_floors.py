"""Imports go down: a module imports from lower floors or its own part, no two files import each other in a circle,
each heavy package has one home, and each folder's map is true."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ddetr

ROOT = Path(ddetr.__file__).parent
FLOORS = {
    0: "errors wording printable",
    1: "untrusted",
    2: "arrays files console settings padding boxes ops",
    3: "runtime weight_files",
    4: "datasets models",
    5: "checkpoint evaluation doctor",
    6: "inference",
    7: "report",
    8: "engine",
    9: "demo",
    10: "bench",
    11: "cli",
    12: "__main__ __init__",
}
# Inside engine/: files and folders of its own.
ENGINE_FLOORS = {
    0: "__init__ config",
    1: "step run compile freeze",
    2: "loading optimizer memory saving loggers",
    3: "blackbox",
    4: "module",
    5: "callbacks early_stopping ema batch_size fit preflight prepare",
    6: "run_report",
    7: "train",
}
HEAVY = {
    *("timm", "scipy", "lightning", "jsonargparse", "matplotlib", "fastapi", "onnx", "transformers", "supervision"),
    *("hotcoco", "faster_coco_eval", "pycocotools", "jinja2", "markupsafe", "huggingface_hub"),
}
MOST_FILES = 22  # in a folder; beyond, it wants rooms
MOST_LINES = 80  # of a function without a reason above it


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports() -> Iterator[tuple[str, str, str]]:
    """(file that imports, as a module's name; "file:line"; dotted name) for every import, wherever in the file it
    stands: in functions and under TYPE_CHECKING too."""
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                yield module, f"{path.relative_to(ROOT.parent)}:{node.lineno}", name


def part_of(name: str, folder: str) -> str | None:
    """ "ddetr.engine.blackbox.guard" in "ddetr" is "engine"; None for what lies elsewhere."""
    if name == folder:
        return "__init__"
    return name.removeprefix(f"{folder}.").split(".")[0] if name.startswith(f"{folder}.") else None


@pytest.mark.parametrize(("folder", "floors"), [("ddetr", FLOORS), ("ddetr.engine", ENGINE_FLOORS)])
def test_modules_import_from_lower_floors_only(folder: str, floors: dict[int, str]) -> None:
    floor_of = {part: floor for floor, parts in floors.items() for part in parts.split()}
    wrong = []
    for module, where, name in imports():
        part, imported = part_of(module, folder), part_of(name, folder)
        if part is None or imported is None or name == folder or imported in (part, "__version__"):
            continue
        assert part in floor_of, f"{where}: give {part!r} a floor"
        if floor_of[imported] >= floor_of[part]:
            wrong.append(f"{where}: {part} (floor {floor_of[part]}) imports {imported} (floor {floor_of[imported]})")
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, _, name in imports():
        imported = name if name in FILES else name.rpartition(".")[0]
        if imported in FILES and imported != module:
            graph[module].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imported by ".join(error.args[1]))


def test_each_heavy_package_has_one_home() -> None:
    homes = defaultdict(set)
    for module, _, name in imports():
        if name.split(".")[0] in HEAVY:
            homes[name.split(".")[0]].add(part_of(module, "ddetr"))
    assert {package: parts for package, parts in homes.items() if len(parts) > 1} == {}


def test_importing_the_package_is_light() -> None:
    code = "import sys, ddetr; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY.union({"torch", "torchvision"}) & set(loaded)


@pytest.mark.parametrize("init", sorted(ROOT.rglob("__init__.py")), ids=module_name)
def test_the_map_of_a_folder_names_what_is_there_and_nothing_else(init: Path) -> None:
    text = ast.get_docstring(ast.parse(init.read_text("utf-8"))) or ""
    named = set(re.findall(r"[\w*]+\.py\b", text)) | set(re.findall(r"^\w+/", text, re.MULTILINE))
    there = {path.name for path in init.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
    there |= {f"{path.parent.name}/" for path in init.parent.glob("*/__init__.py")}
    assert [name for name in sorted(there) if not any(fnmatch(name, pattern) for pattern in named)] == [], "not named"
    assert [name for name in sorted(named) if not any(fnmatch(real, name) for real in there)] == [], "not there"


def test_a_long_function_says_why() -> None:
    silent = []
    for path in FILES.values():
        lines = path.read_text("utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if not lines[first - 2].lstrip().startswith("#"):
                    silent.append(f"{path.relative_to(ROOT.parent)}:{node.lineno} {node.name}")
    assert silent == []


def test_no_folder_is_crowded() -> None:
    tests = Path(__file__).parent
    folders = {folder: root for root in (ROOT, tests) for folder in (root, *root.rglob("*/")) if folder.is_dir()}
    counts = {
        str(folder.relative_to(root.parent)): sum(path.is_file() and path.suffix != ".pyc" for path in folder.iterdir())
        for folder, root in folders.items()  # the package may be installed elsewhere than the tests are
    }
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_numbers_of_bytes_say_their_order() -> None:
    """Python 3.10, the oldest that is supported, has no default for it."""
    silent = [
        f"{path.relative_to(ROOT.parent)}:{node.lineno}"
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_bytes"
        if len(node.args) + len(node.keywords) < 2
    ]
    assert silent == []
