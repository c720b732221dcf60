"""What the image's files say, without building anything: linters, locks, versions, the user."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
LOCKS = sorted(CONTAINER.glob("*.lock"))
VERSIONS = json.loads((CONTAINER / "versions.json").read_text(encoding="utf-8"))


def tool(name: str) -> str:
    """Of this environment, or the system's."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: it is in the extra `test`")
    return path


def build_arguments(*arguments: str) -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("build_arguments", CONTAINER / "build_arguments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_arguments(*arguments)


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


def pins(lock: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([a-z0-9][a-z0-9._-]*)==(\S+)", (CONTAINER / f"requirements-{lock}.lock").read_text(), re.MULTILINE
    ):
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


@pytest.mark.parametrize("path", LOCKS, ids=[path.name for path in LOCKS])
def test_every_requirement_has_a_hash(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[a-z0-9._-]+==\S+", block), block
        assert "--hash=sha256:" in block, block
    assert "://" not in text, "a lock names no index: the machine that builds does"


def test_there_is_a_lock_for_each_list() -> None:
    assert {path.stem for path in LOCKS} >= {path.stem for path in CONTAINER.glob("*.in")}
    assert len(LOCKS) == 5


@pytest.mark.parametrize("lock", ["light", "workspace", "test"])
def test_the_locks_agree_with_core(lock: str) -> None:
    core = pins("core")
    shared = {name: versions for name, versions in pins(lock).items() if name in core}
    assert shared
    for name, versions in shared.items():
        assert versions <= core[name], name


def test_the_lock_is_of_these_versions() -> None:
    core = pins("core")
    variant = VERSIONS["variants"][VERSIONS["image"]["default_variant"]]
    assert variant["locked"]
    assert core["torch"] == {VERSIONS["torch"]}
    assert core["torchvision"] == {VERSIONS["torchvision"]}
    assert core["nvidia-cudnn-cu12"] == {variant["cudnn"]}
    assert core["nvidia-nccl-cu12"] == {variant["nccl"]}
    assert all(version.startswith(variant["cuda"] + ".") for version in core["nvidia-cuda-runtime-cu12"])
    asked = (CONTAINER / "requirements-core.in").read_text(encoding="utf-8")
    assert f"torch=={VERSIONS['torch']}\n" in asked
    assert f"torchvision=={VERSIONS['torchvision']}\n" in asked
    assert not {"torch", "torchvision", "triton"} & pins("light").keys()


@pytest.mark.parametrize("target", ["train", "workspace"])
def test_the_defaults_are_those_of_the_versions(target: str) -> None:
    arguments = build_arguments()
    given = defaults(stages()[target])
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)[1]
    assert base == arguments.pop("BASE_IMAGE")
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
    with pytest.raises(SystemExit, match="VARIANT=cu121: expected one of cu118, cu124, cu126"):
        build_arguments("cu121")
    script = [sys.executable, str(CONTAINER / "build_arguments.py"), "cu118"]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert "CUDA=11.8\n" in printed
    assert f"BASE_IMAGE={VERSIONS['image']['base']}@" in printed


def test_the_makefile_and_the_versions_agree() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"\nIMAGE = {VERSIONS['image']['name']}:{VERSIONS['image']['tag']}\n" in makefile


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
