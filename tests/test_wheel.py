"""The build hook and the wheel: what is in it, where it runs, and that an installation never ends for want of a
compiler."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddetr.ops.native import build

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("hatchling", reason="builds the package")


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """hatch_build.py's hook on a machine with the compilers that the test puts into `commands`; builds nothing."""
    for variable in ("DDETR_NATIVE", "DDETR_WHEEL_PLATFORM"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = []

    def abort(message):
        said.append(("abort", message))
        raise SystemExit(1)

    app = SimpleNamespace(
        display_warning=lambda message: said.append(("warning", message)),
        display_info=lambda message: said.append(("info", message)),
        abort=abort,
    )
    made = SimpleNamespace(commands=[], said=said, compile=lambda command, name, output: None)
    monkeypatch.setattr(build, "compilers", lambda name, portable=False: made.commands)
    monkeypatch.setattr(build, "_compile", lambda *arguments: made.compile(*arguments))
    monkeypatch.setattr(build, "host", lambda: "linux-x86_64")
    monkeypatch.setattr(module, "_load_build", lambda: build)

    def initialize(target="wheel"):
        hook = module.NativeBuildHook(str(ROOT), {}, None, None, str(tmp_path), target, app)
        data = {"pure_python": True, "artifacts": []}
        made.dependencies = hook.dependencies()
        hook.initialize("standard", data)
        return data

    made.initialize = initialize
    return made


ZIG = ["python", "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.17"]


def test_with_a_compiler_of_the_system(hook):
    hook.commands = [["c++"]]
    data = hook.initialize()
    assert hook.dependencies == []
    assert data["tag"].startswith("py3-none-")
    assert "manylinux" not in data["tag"], "what the system compiles may need its C library"
    assert not data["pure_python"]


@pytest.mark.parametrize("platform", ["", "host", "linux-aarch64", "windows-x86_64"])
def test_with_ziglang(hook, monkeypatch, platform):
    monkeypatch.setenv("DDETR_WHEEL_PLATFORM", platform)
    hook.commands = [ZIG]
    target = build.TARGETS[platform if platform in build.TARGETS else "linux-x86_64"]
    data = hook.initialize()
    assert hook.dependencies == (["ziglang>=0.14"] if platform else [])
    assert data["tag"] == f"py3-none-{target.wheel}"
    assert data["artifacts"] == [f"/ddetr/ops/native/lib/msda-{target.name}{target.suffix}"]
    assert (ROOT / data["artifacts"][0].lstrip("/")) == build.library_path(target.name)


def fail(*_):
    raise subprocess.CalledProcessError(1, ["c++"], stderr="error: out of ideas")


def surprise(*_):
    raise KeyError("something nobody thought of")


@pytest.mark.parametrize(
    ("commands", "compile", "message"),
    [
        ([], None, "no compiler for linux-x86_64 here: pip install ziglang"),
        ([["c++"]], fail, "out of ideas"),
        ([["c++"]], surprise, "KeyError: 'something nobody thought of'"),
    ],
    ids=["no compiler", "it fails", "anything"],
)
def test_without_a_library_the_installation_goes_on(hook, monkeypatch, commands, compile, message):
    hook.commands, hook.compile = commands, compile
    data = hook.initialize()
    assert hook.dependencies == ([] if commands else ["ziglang>=0.14"])
    assert data == {"pure_python": True, "artifacts": []}
    ((kind, said),) = hook.said
    assert kind == "warning"
    assert said.startswith("ddetr: the CPU kernel was not built, slower PyTorch code stands in.")
    assert message in said
    monkeypatch.setenv("DDETR_WHEEL_PLATFORM", "host")  # to give away: then it is a failure
    with pytest.raises(SystemExit):
        hook.initialize()
    assert hook.said[-1][0] == "abort"
    assert message in hook.said[-1][1]


def test_an_unknown_platform(hook, monkeypatch):
    monkeypatch.setenv("DDETR_WHEEL_PLATFORM", "amiga")
    with pytest.raises(SystemExit):
        hook.initialize()
    assert hook.said == [("abort", f"DDETR_WHEEL_PLATFORM=amiga: choose one of host, {', '.join(build.TARGETS)}")]


@pytest.mark.parametrize(("native", "target"), [("0", "wheel"), ("1", "sdist")])
def test_where_nothing_is_compiled(hook, monkeypatch, native, target):
    monkeypatch.setenv("DDETR_NATIVE", native)
    hook.compile = surprise
    assert hook.initialize(target) == {"pure_python": True, "artifacts": []}
    assert hook.dependencies == hook.said == []


def test_only_ziglang_builds_for_every_machine(monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)
    monkeypatch.setattr(shutil, "which", lambda command: f"/usr/bin/{command}")
    assert ["c++"] in build.compilers(build.host())
    assert build.compilers(build.host(), portable=True) == []


# ---- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is built, without anybody's library."""
    folder = tmp_path_factory.mktemp("wheel") / "tree of ddetr"
    ignore = shutil.ignore_patterns("__pycache__", "lib", ".venv")
    shutil.copytree(ROOT / "ddetr", folder / "ddetr", ignore=ignore)
    for name in ("configs", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "pyproject.toml", "hatch_build.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    shutil.copy(ROOT / ".gitignore", folder / ".gitignore")
    return folder


def hatchling(tree, target, output, **environment):
    """The one file that is built, and what was said; `environment` beside a PATH without any compiler."""
    environment = {**os.environ, "PATH": "", "CXX": "", "DDETR_NATIVE": "1", "DDETR_WHEEL_PLATFORM": "", **environment}
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.iterdir()
    return built, done.stdout + done.stderr


def installed(wheel, folder):
    """What `backends()` says of the CPU after the wheel's installation, where there is no compiler: name -> row."""
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=200)
    code = f"""
import json, sys, torch, ddetr
from ddetr.ops import backends, ms_deform_attn
assert ddetr.__file__.startswith({str(folder)!r}), ddetr.__file__
value = torch.ones(1, 36, 2, 8, requires_grad=True)
points, weights = torch.full((1, 50, 2, 1, 4, 2), 0.5), torch.full((1, 50, 2, 1, 4), 0.25)
output = ms_deform_attn(value, [(6, 6)], points, weights)
output.sum().backward()
assert torch.equal(output, torch.ones(1, 50, 16)) and value.grad.sum() == 800
print(json.dumps({{row.name: row for row in backends() if row.device == "cpu"}}))
"""
    environment = {**os.environ, "PATH": "", "PYTHONPATH": str(folder)}
    environment.pop("DDETR_OPS", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_wheel_holds_a_library_that_runs(tree, tmp_path):
    pytest.importorskip("ziglang")
    wheel, said = hatchling(tree, "wheel", tmp_path / "dist", DDETR_WHEEL_PLATFORM="host")
    target = build.TARGETS[build.host()]
    assert wheel.name.endswith(f"-py3-none-{target.wheel}.whl")
    assert "CPU kernel built" in said
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if "/native/lib/" in name]
        assert library == f"ddetr/ops/native/lib/msda-{target.name}{target.suffix}"
        binary = archive.read(library)
        sources = {f"ddetr/report/{name}" for name in ("frame.html", "parts.html", "page.html", "data_page.html")}
        assert sources | {"ddetr/report/style.css"} <= set(archive.namelist())
    for place in (
        tree,
        tmp_path,
        ROOT,
        Path.home(),
        sys.prefix,
        Path(shutil.which("python3") or sys.executable).parent,
    ):
        assert str(place).encode() + b"/" not in binary, "no path of the machine that built it"
    rows = installed(wheel, tmp_path / "site")
    assert rows["native"][2:4] == [True, True], rows["native"]


@pytest.mark.slow
def test_the_source_archive_installs_without_a_compiler(tree, tmp_path):
    (tmp_path / "ziglang.py").write_text("raise ImportError('not here')")
    hidden = tree / "ddetr" / "ops" / "native" / "lib" / "msda-somebody-else.so"
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_text("not for others")
    archive, _ = hatchling(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert {"hatch_build.py", "ddetr/ops/native/kernel.cpp", "ddetr/ops/native/msda.h"} <= names
    assert not [name for name in names if "/lib/" in name]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder, environment in (("none", {"PYTHONPATH": str(tmp_path)}), ("off", {"DDETR_NATIVE": "0"})):
        wheel, said = hatchling(unpacked, "wheel", tmp_path / folder, **environment)
        assert wheel.name.endswith("-py3-none-any.whl")
        assert ("slower PyTorch code stands in. no compiler for" in said) == (folder == "none")
        rows = installed(wheel, tmp_path / f"site {folder}")
        assert rows["embedding_bag"][2:4] == [True, True]
        assert "build it with `python -m ddetr.ops.native.build`" in rows["native"][4]
