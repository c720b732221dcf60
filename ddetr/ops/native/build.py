"""Compile the CPU kernel: `python -m ddetr.ops.native.build`, or by hatch_build.py when the package is installed.

Needs the standard library alone (it also runs before anything is installed). The compiler is ziglang's (`pip install
ziglang`: one wheel of about 100 MB that compiles for every platform on any of them, against glibc 2.17), else the
system's. Fast mathematics stays off: NaN and clamps must mean what they say.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
COMMON = [
    "-O3",
    "-std=c++17",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-psabi",
]
# The table's name, its vector width in floats, GCC's and Clang's flags (zig calls architectures by other names).
X86 = (
    ("sse4", 4, ["-msse4.1"]),
    ("avx2", 8, ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]),
    (
        "avx512",
        16,
        [
            "-mavx2",
            "-mfma",
            "-mbmi",
            "-mbmi2",
            "-mlzcnt",
            "-mavx512f",
            "-mavx512dq",
            "-mavx512bw",
            "-mavx512vl",
            "-mprefer-vector-width=512",
        ],
    ),
)
OTHER = (("generic", 4, []),)


class Target(NamedTuple):
    """A platform: its name in the file name, zig's triple, the ending, the wheel's tag."""

    name: str
    triple: str
    suffix: str
    wheel: str


TARGETS = {
    target.name: target
    for target in (
        Target("linux-x86_64", "x86_64-linux-gnu.2.17", ".so", "manylinux2014_x86_64"),
        Target("linux-aarch64", "aarch64-linux-gnu.2.17", ".so", "manylinux2014_aarch64"),
        Target("macos-arm64", "aarch64-macos.11.0", ".dylib", "macosx_11_0_arm64"),
        Target("macos-x86_64", "x86_64-macos.10.15", ".dylib", "macosx_10_15_x86_64"),
        Target("windows-x86_64", "x86_64-windows-gnu", ".dll", "win_amd64"),
    )
}


class BuildError(RuntimeError):
    """No library was built; the message says why."""


def host() -> str:
    """The name of this machine's platform, whether or not it is in TARGETS."""
    system = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}.get(
        platform.system(), platform.system().lower()
    )
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "arm64" if system == "macos" else "aarch64"}.get(machine, machine)
    if system == "linux" and machine == "x86_64" and sys.maxsize < 2**32:
        machine = "i686"
    return f"{system}-{machine}"


def library_path(name: str | None = None) -> Path:
    """Where the library of a platform lies (default: of this machine)."""
    name = name or host()
    suffix = TARGETS[name].suffix if name in TARGETS else ".so"
    return SOURCES / "lib" / f"msda-{name}{suffix}"


def source_id() -> str:
    """A hash of the sources beside this file, compiled into the library, so that a stale one is noticed."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compilers(name: str, portable: bool = False) -> list[list[str]]:
    """Commands that can build for a platform, best first; `portable`: for every machine of it."""
    found = []
    try:
        import ziglang  # noqa: F401
    except ImportError:
        pass
    else:
        if name in TARGETS:
            found.append([sys.executable, "-m", "ziglang", "c++", "-target", TARGETS[name].triple])
    if name == host() and not portable:
        candidates = [os.environ["CXX"].split()] if os.environ.get("CXX") else []
        candidates += [[command] for command in ("c++", "g++", "clang++")]
        found += [command for command in candidates if shutil.which(command[0])]
    return found


class Built(NamedTuple):
    """A library, and whether it runs on every machine of the wheel's tag (zig's does, the system's may not)."""

    path: Path
    portable: bool


def build(name: str | None = None, output: Path | None = None, portable: bool = False) -> Built:
    """Compile for a platform (default: this machine).

    Args:
        name: of `TARGETS` or `host()`.
        output: where to put the library (default: beside the sources).
        portable: by ziglang or not at all.

    Raises:
        BuildError: no compiler, or none that succeeds (with the last one's words).
    """
    name = name or host()
    output = output or library_path(name)
    commands = compilers(name, portable)
    if not commands:
        cure = "pip install ziglang" + (", or install a C++ compiler" if name == host() and not portable else "")
        raise BuildError(f"no compiler for {name} here: {cure}")
    failures = []
    for command in commands:
        try:
            _compile(command, name, output)
        except subprocess.CalledProcessError as error:
            failures.append(f"{' '.join(error.cmd)}:\n{error.stderr.strip()[-2000:]}")
        except OSError as error:
            failures.append(f"{' '.join(command)}: {error}")
        else:
            return Built(output, "-target" in command)
    raise BuildError("\n".join([f"no compiler succeeded for {name}", *failures]))


def _compile(command: list[str], name: str, output: Path) -> None:
    system, _, machine = name.partition("-")
    flags = list(COMMON) if system == "windows" else [*COMMON, "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [("msda.cpp", "msda.o", [f'-DMSDA_SOURCE="{source_id()}"']), ("pool.cpp", "pool.o", [])]
        for table, width, isa_flags in X86 if machine == "x86_64" else OTHER:
            defines = [f"-DMSDA_ISA={table}", f"-DMSDA_WIDTH={width}"]
            jobs.append(("kernel.cpp", f"{table}.o", [*isa_flags, *defines]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [
                pool.submit(_run, [*command, *flags, *more, "-c", source, "-o", str(Path(folder, target))])
                for source, target, more in jobs
            ]
        for job in compiled:
            job.result()
        objects = [str(Path(folder, target)) for _, target, _ in jobs]
        # zig takes -nostdlib++ to mean "no C++ library", which is most of what it would compile for a new target
        link = [
            "-shared",
            *([] if system == "windows" else ["-pthread"]),
            *(["-nostdlib++"] if "-target" in command else []),
        ]
        if "-target" in command:
            link.append("-Wl,-s")
        partial = Path(folder, output.name)
        _run([*command, *link, *objects, "-o", str(partial)])
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_suffix(f".{os.getpid()}.new")  # a running process keeps the old file
        shutil.copyfile(partial, fresh)
        os.replace(fresh, output)


def _run(command: list[str]) -> None:
    # Relative names from the sources' folder: no path of this machine gets into the file.
    subprocess.run(command, cwd=SOURCES, check=True, capture_output=True, text=True)


def main() -> None:
    """Command line: build for this machine, or for --target."""
    parser = argparse.ArgumentParser(description="compile the CPU kernel of ms_deform_attn", allow_abbrev=False)
    parser.add_argument("--target", choices=[*TARGETS, "all"], help="platform (default: this machine)")
    parser.add_argument("--output", type=Path, help="where to put the library (default: beside the sources)")
    options = parser.parse_args()
    for name in TARGETS if options.target == "all" else [options.target or host()]:
        try:
            path = build(name, options.output).path
        except BuildError as error:
            sys.exit(f"error: {error}")
        sys.stdout.write(f"{path} ({path.stat().st_size / 1024:.0f} KiB)\n")


if __name__ == "__main__":
    main()
