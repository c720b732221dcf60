"""What the image's files say, without building anything: linters, locks, versions, the user."""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
LOCKS = sorted(CONTAINER.rglob("*.lock"))
VERSIONS = json.loads((CONTAINER / "versions.json").read_text(encoding="utf-8"))
LOCKED = {name: variant for name, variant in VERSIONS["variants"].items() if variant["locked"]}
DEFAULT = LOCKED[VERSIONS["image"]["default_variant"]]


def tool(name: str) -> str:
    """Of this environment, or the system's."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: it is in the extra `test`")
    return path


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CONTAINER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_arguments(*arguments: str) -> dict[str, str]:
    return program("build_arguments").build_arguments(*arguments)


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, those of the stage that it begins with first; continued lines joined."""
    found: dict[str, list[str]] = {}
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    for instruction in "\n".join(lines).replace("\\\n", " ").splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", instruction):
            found[match[2]] = list(found.get(match[1], []))
        elif found and instruction.strip():
            found[list(found)[-1]].append(re.sub(r"\s+", " ", instruction))
    return found


def defaults(instructions: list[str]) -> dict[str, str]:
    arguments = " ".join(line.removeprefix("ARG ") for line in instructions if line.startswith("ARG "))
    return dict(word.split("=", 1) for word in arguments.split() if "=" in word)


def pins(lock: str, tag: str = DEFAULT["tag"]) -> dict[str, set[str]]:
    """Versions of each package in a lock."""
    found: dict[str, set[str]] = {}
    text = (CONTAINER / tag / f"requirements-{lock}.lock").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def test_hadolint() -> None:
    subprocess.run([tool("hadolint"), str(CONTAINER / "Dockerfile")], check=True)


def test_shellcheck() -> None:
    scripts = [str(path) for path in sorted(CONTAINER.glob("*.sh"))]
    assert len(scripts) >= 5
    subprocess.run([tool("shellcheck"), "--severity=style", *scripts], check=True, cwd=ROOT)


def test_nothing_deletes_a_cache_as_a_whole() -> None:
    """In its root lies the engine's lock: the next step that wants the cache waits for it for ever (podman 4.3)."""
    roots = set(re.findall(r"--mount=type=cache,\S*?target=([^,\s]+)", DOCKERFILE))
    assert roots
    deletes = re.compile(rf"(?:^|\s)(find|rm|mv|-m venv|clean)\b.*({'|'.join(map(re.escape, roots))})/?[\"']?(\s|;|$)")
    for path in (CONTAINER / "Dockerfile", *CONTAINER.glob("*.sh")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not deletes.search(line), f"{path.name}: {line}"


@pytest.mark.parametrize("path", LOCKS, ids=[str(path.relative_to(CONTAINER)) for path in LOCKS])
def test_every_requirement_has_a_hash(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[a-z0-9._-]+==\S+", block), block
        assert "--hash=sha256:" in block, block
    assert "://" not in text, "a lock names no index: the machine that builds does"


def test_there_is_a_lock_for_each_list() -> None:
    """`light` has no PyTorch, and `build` is the same for all."""
    assert {path.stem for path in LOCKS} == {"requirements-test"} | {path.stem for path in CONTAINER.glob("*.in")}
    expected = {CONTAINER / "requirements-build.lock", CONTAINER / DEFAULT["tag"] / "requirements-light.lock"}
    for variant in LOCKED.values():
        expected |= {CONTAINER / variant["tag"] / f"requirements-{name}.lock" for name in ("core", "workspace", "test")}
    assert set(LOCKS) == expected


@pytest.mark.parametrize(
    ("lock", "tag"),
    [("light", DEFAULT["tag"]), *((lock, row["tag"]) for row in LOCKED.values() for lock in ("workspace", "test"))],
)
def test_the_locks_agree_with_core(lock: str, tag: str) -> None:
    core = pins("core", tag)
    shared = {name: versions for name, versions in pins(lock, tag).items() if name in core}
    assert shared
    for name, versions in shared.items():
        assert versions <= core[name], name


def test_variants_of_one_tag_have_one_pytorch() -> None:
    """They share its locks, and just one variant of them is what the locks hold."""
    by_tag: dict[str, set[tuple[str, str]]] = {}
    for variant in VERSIONS["variants"].values():
        by_tag.setdefault(variant["tag"], set()).add((variant["torch"], variant["torchvision"]))
    assert all(len(versions) == 1 for versions in by_tag.values())
    assert sorted(variant["tag"] for variant in LOCKED.values()) == sorted(by_tag)


@pytest.mark.parametrize("name", LOCKED)
def test_the_lock_is_of_these_versions(name: str) -> None:
    variant = LOCKED[name]
    core = pins("core", variant["tag"])
    major = variant["cuda"].partition(".")[0]
    assert core["torch"] == {variant["torch"]}
    assert core["torchvision"] == {variant["torchvision"]}
    assert core[f"nvidia-cudnn-cu{major}"] == {variant["cudnn"]}
    assert core[f"nvidia-nccl-cu{major}"] == {variant["nccl"]}
    runtime = core.get(f"nvidia-cuda-runtime-cu{major}") or core["nvidia-cuda-runtime"]
    assert all(version.startswith(variant["cuda"] + ".") for version in runtime)
    asked = (CONTAINER / variant["tag"] / "torch.in").read_text(encoding="utf-8")
    assert f"torch=={variant['torch']}\n" in asked
    assert f"torchvision=={variant['torchvision']}\n" in asked


def test_light_has_no_pytorch() -> None:
    assert not {"torch", "torchvision", "triton"} & pins("light").keys()


@pytest.mark.parametrize("name", LOCKED)
def test_the_installation_knows_which_variant_the_lock_holds(name: str, tmp_path: Path) -> None:
    """By install.sh's own line: another VARIANT is not to be installed from this lock."""
    script = (CONTAINER / "install.sh").read_text(encoding="utf-8")
    line = next(line for line in script.splitlines() if line.startswith("locked_variant() "))
    shutil.copy(CONTAINER / LOCKED[name]["tag"] / "requirements-core.lock", tmp_path)
    command = ["bash", "-euc", f"{line}\nlocked_variant"]
    variables = os.environ | {"here": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    assert done.stdout == f"{name}\n"


@pytest.mark.parametrize("target", ["train", "workspace"])
def test_the_defaults_are_those_of_the_versions(target: str) -> None:
    arguments = build_arguments()
    for_all = dict(re.findall(r"^ARG (\S+?)=(\S+)$", DOCKERFILE.partition("\nFROM ")[0], re.MULTILINE))
    given = for_all | defaults(stages()[target])
    base = for_all["BASE_IMAGE"]
    assert base == arguments["BASE_IMAGE"]
    assert {name: given[name] for name in arguments} == arguments
    assert defaults(stages()["environment"])["VARIANT"] == arguments["VARIANT"]
    assert re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", base), "by digest"


@pytest.mark.parametrize("target", ["train", "workspace"])
def test_every_argument_is_a_label(target: str) -> None:
    labels = " ".join(line for line in stages()[target] if line.startswith("LABEL "))
    for name in build_arguments():
        if name != "BASE_DIGEST":
            assert f'"${{{name}}}"' in labels, name
    for name in ("title", "description", "version", "revision", "licenses", "base.name", "base.digest"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_the_arguments_of_a_variant_and_of_another_base() -> None:
    arguments = build_arguments("cu126", "localhost/mine:1")
    assert arguments["CUDA"] == "12.6"
    assert arguments["CUDNN"] == VERSIONS["variants"]["cu126"]["cudnn"]
    assert arguments["BASE_IMAGE"] == "localhost/mine:1"
    assert arguments["BASE_DIGEST"] == ""
    assert arguments["IMAGE_VERSION"] == "v2.6"
    today = build_arguments("cu130")
    assert [today[name] for name in ("IMAGE_VERSION", "TORCH", "CUDA")] == ["current", "2.14.1", "13.0"]
    with pytest.raises(SystemExit, match="VARIANT=cu121: expected one of cu118, cu124, cu126, cu130"):
        build_arguments("cu121")
    script = [sys.executable, str(CONTAINER / "build_arguments.py"), "cu118"]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert "CUDA=11.8\n" in printed
    assert f"BASE_IMAGE={VERSIONS['image']['base']}@" in printed


@pytest.mark.parametrize("name", [None, *VERSIONS["variants"]])
def test_make_names_the_image_by_its_variant(name: str | None) -> None:
    variant = VERSIONS["variants"][name] if name else DEFAULT
    image = f"{VERSIONS['image']['name']}:{variant['tag']}"
    command = ["make", "--dry-run", "--no-print-directory", "image", "image-train", f"VARIANT={name or ''}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        f"container/build.sh workspace {image}",
        f"container/build.sh train {image}-train",
    ]


def test_make_renews_the_locks_of_every_tag() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"\tfor tag in {' '.join(variant['tag'] for variant in LOCKED.values())}; do" in makefile


def test_no_image_ends_as_root() -> None:
    for target in ("train", "test", "workspace"):
        users = [line for line in stages()[target] if line.startswith("USER ")]
        assert users[-1] == "USER 1000:100", f"{target}: by number, and not root"
        assert stages()[target][-1] == users[-1] or target != "test"
    assert list(stages())[-1] == "workspace", "the default target is the last"
    assert "$" not in " ".join(line for line in DOCKERFILE.splitlines() if line.startswith("USER ")), (
        "a variable that this stage lacks is empty, and an empty user is root"
    )


def test_the_context_is_a_list_of_what_may_enter() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == {
        *("configs", "container", "ddetr", "notebooks", "hatch_build.py", "pyproject.toml"),
        *("LICENSE", "NOTICE", "README.md"),
    }


@pytest.mark.parametrize("path", ["Dockerfile", "entrypoint.sh", "install.sh", "ddetr.sh", "build.sh", "sshd_config"])
def test_nothing_asks_for_more_rights(path: str) -> None:
    text = (CONTAINER / path).read_text(encoding="utf-8")
    assert not re.search(r"\bsudo\b|chmod (-R )?777|--privileged|NOPASSWD", text)


def test_sshd_takes_keys_only() -> None:
    text = (CONTAINER / "sshd_config").read_text(encoding="utf-8")
    options = dict(line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#"))
    assert options["AuthenticationMethods"] == "publickey"
    for option in ("PasswordAuthentication", "KbdInteractiveAuthentication", "PermitEmptyPasswords", "PermitRootLogin"):
        assert options[option] == "no", option
    assert options["StrictModes"] == "yes"
    assert "Port" not in options, "in one place only: the entrypoint's"


def test_every_installation_of_packages_ends_without_rights() -> None:
    installing = [line for lines in stages().values() for line in lines if "apt-get install" in line]
    assert len(installing) >= 2
    for line in installing:
        assert line.endswith("&& python3 -B /opt/ddetr/container/drop_rights.py"), line


def test_files_lose_the_rights_that_they_give(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2775)  # of a folder the bit says whose the new files are
    modes = {"setuid": 0o4755, "setgid": 0o2711, "both": 0o6755, "plain": 0o640, "capable": 0o755}
    for name, mode in modes.items():
        (folder / name).touch()
        (folder / name).chmod(mode)
    (folder / "link").symlink_to(folder / "nowhere")
    expected = {"setuid", "setgid", "both"}
    try:  # takes root
        os.setxattr(
            folder / "capable", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
        )
        expected.add("capable")
    except OSError:
        pass
    drop_rights = program("drop_rights").drop_rights
    assert {Path(path).name for path in drop_rights(str(tmp_path))} == expected
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == {
        name: mode & 0o777 for name, mode in modes.items()
    }
    assert os.listxattr(folder / "capable") == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2775
    assert drop_rights(str(tmp_path)) == []


def session_environment(variables: dict[bytes, bytes]) -> subprocess.CompletedProcess:
    """By the entrypoint's own function: the line of sshd_config, and on stderr what is left out."""
    script = (CONTAINER / "entrypoint.sh").read_text(encoding="utf-8")
    function = re.search(r"^session_environment\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)[0]
    command = ["bash", "-euo", "pipefail", "-c", f"{function}\nsession_environment"]
    return subprocess.run(command, check=True, capture_output=True, env={b"PATH": os.environb[b"PATH"]} | variables)


def test_any_value_stands_in_one_line_of_sshds_configuration() -> None:
    """In the quotes that OpenSSH reads; tests/container/test_image_ssh.py has it read them."""
    values = {
        b"CUDA_X": b"C:\\",
        b"DDETR_A": b'"',
        b"DDETR_B": b"\\\" \\\\'",
        b"DDETR_C": b"",
        b"DDETR_D": b" \t # $HOME `id` %h ",
        b"DDETR_E": "\u00e9\u6f22\u202e".encode(),
        b"DDETR_F": b"\xff\xfe\\",
        b"DDETR_lower.and-other": b"\x1b[31m",
    }
    done = session_environment(values | {b"AUTHORIZED_KEYS": b"x", b"XDDETR_A": b"x"})
    assert done.stderr == b""
    keyword, line = done.stdout.split(b" ", 1)
    assert (keyword, line.count(b"\n"), line[-1:]) == (b"SetEnv", 1, b"\n")
    quoted = re.findall(rb'"((?:[^\\"]|\\.)*)"', line)
    assert b"".join(b' "%s"' % word for word in quoted) == b" " + line[:-1]
    got = dict(re.sub(rb"\\(.)", rb"\1", word, flags=re.DOTALL).split(b"=", 1) for word in quoted)
    assert got == values | {b"PATH": os.environb[b"PATH"]}


def test_a_value_that_sshd_cannot_pass_on_is_named_and_not_shown() -> None:
    values = {b"DDETR_TEXT": b"secret\nPermitRootLogin yes", b"CUDA_LONG": b"secret" * 20_000, b"OMP_\x1b\n": b"secret"}
    done = session_environment(values | {b"CUDA_MORE": b"\\" * 15_000, b"TORCH_HOME": b"/x"})
    assert re.findall(rb'"(\w+)=', done.stdout) == [b"CUDA_LONG", b"PATH", b"TORCH_HOME"]
    assert b"PermitRootLogin" not in done.stdout
    assert done.stderr.decode("ascii").splitlines() == [
        "warning: SSH sessions do not have CUDA_MORE: this environment is too large for sshd",
        "warning: SSH sessions do not have DDETR_TEXT: its value has a line break, which sshd cannot pass on",
        "warning: SSH sessions do not have $'OMP_\\E\\n': its value has a line break, which sshd cannot pass on",
    ]


def test_no_value_is_in_a_command_line() -> None:
    script = (CONTAINER / "entrypoint.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in script.splitlines():
        if line.lstrip().startswith("exec "):
            assert "SetEnv" not in line
            assert "$(" not in line
