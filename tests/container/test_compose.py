"""compose.yaml: what each service may not do, several side by side, and the CPU pair really started with
podman-compose."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from light_containers import ROOT, Container, engine, free_port, key, ssh

SERVICES = ["workspace", "ssh", "train"]
TOKEN = "a-token-of-the-compose-tests"


class Loader(yaml.SafeLoader):
    """YAML with compose's own tag !reset, which takes a setting of the first file away."""


Loader.add_constructor("!reset", lambda *_: None)


def read(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_closed_in(name: str) -> None:
    service = read("compose.yaml")["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "user", "devices"} & set(service)
    data = next(volume for volume in service["volumes"] if ":/workspace/data" in volume)
    assert data.endswith(":ro")
    # Without exec nothing that is compiled at run time could be loaded from there: Docker's default.
    assert service["tmpfs"] == ["/tmp:exec,mode=1777"]
    # 64 MB, the default, is not enough for one batch of images.
    assert service["shm_size"] == "${DDETR_SHM:-8gb}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("compose*.y*ml")), ids=lambda path: path.name)
def test_a_wrong_setting_is_not_tried_for_ever(path: Path) -> None:
    """The start ends with exit code 64 or 78, and compose cannot tell these from a crash."""
    for name, service in read(path.name)["services"].items():
        assert re.fullmatch(r"no|on-failure:[1-5]", service.get("restart", "no")), f"{path.name}, {name}"


def test_no_page_says_to_restart_for_ever() -> None:
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob(".devcontainer/*")):
        assert not re.search(r"unless-stopped|restart[=: ]+always", path.read_text(encoding="utf-8")), path.name


def test_no_port_is_open_to_the_network() -> None:
    ports = [port for service in read("compose.yaml")["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_are_files_that_git_does_not_see() -> None:
    """And no service has one in its environment, where `inspect` shows it."""
    compose = read("compose.yaml")
    assert compose["secrets"]
    for secret in compose["secrets"].values():
        assert set(secret) == {"file"}
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert name.endswith("_FILE"), name
            assert value.startswith("/run/secrets/")
    ignored = subprocess.run(["git", "check-ignore", "secrets/jupyter_token", "data/image.jpg"], cwd=ROOT, text=True)
    assert ignored.returncode == 0


def test_every_variable_has_a_default_and_a_line() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    used = {part.split(":-")[0] for part in text.split("${")[1:] if ":-" in part.split("}")[0]}
    assert used == {part.split("}")[0].split(":-")[0] for part in text.split("${")[1:]}, "a variable has no default"
    described = {line.split()[1] for line in text.splitlines() if line.startswith("#   DDETR_")}
    assert described == used - {"COMPOSE_PROJECT_NAME"}


def test_the_cpu_file_takes_the_gpu_from_every_service() -> None:
    gpu, cpu = read("compose.yaml")["services"], read("compose.cpu.yaml")["services"]
    assert {name for name, service in gpu.items() if "deploy" in service} == set(cpu)
    assert all(service == {"deploy": None} for service in cpu.values())


def test_the_training_job_can_be_stopped_and_goes_on() -> None:
    train = read("compose.yaml")["services"]["train"]
    assert "--resume=auto" in train["command"]
    assert train["stop_grace_period"] == "2m"
    config = next(word for word in train["command"] if word.startswith("--config=")).partition(":-")[2].rstrip("}")
    assert (ROOT / config).is_file()


def test_the_devcontainer_is_the_workspace() -> None:
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    dockerfile = ROOT / ".devcontainer" / settings["build"]["dockerfile"]
    assert f" AS {settings['build']['target']}\n" in dockerfile.read_text(encoding="utf-8")
    assert settings["remoteUser"] == "dev"
    assert settings["mounts"][0].endswith("readonly")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, ssh_client: str) -> Path:
    """A folder with a key, and the secrets that compose.yaml asks for."""
    folder = tmp_path_factory.mktemp("secrets")
    shutil.copy(f"{key(folder, 'key')}.pub", folder / "authorized_keys")
    (folder / "jupyter_token").write_text(TOKEN + "\n", encoding="utf-8")
    folder.chmod(0o755)
    for name in ("authorized_keys", "jupyter_token"):
        (folder / name).chmod(0o644)
    return folder


@pytest.fixture(scope="module")
def pairs(image: str, usable_engine: str, keys: Path, data: Path) -> Iterator[list[dict[str, Container]]]:
    """The workspace and the SSH server, twice, side by side: with other ports, and otherwise by the same files."""
    if usable_engine == "docker":
        command = [str(ROOT / "container" / "engine.sh"), "compose"]
    else:
        command = [sys.executable, "-m", "podman_compose", "--podman-path", str(ROOT / "container" / "engine.sh")]
    command += ["-f", "compose.yaml", "-f", "compose.cpu.yaml", "--profile", "ssh"]
    found, environments = [], []
    try:
        for project in ("ddetr-test-a", "ddetr-test-b"):
            ports = free_port(), free_port()
            environments.append(
                os.environ
                | {
                    "COMPOSE_PROJECT_NAME": project,
                    "DDETR_IMAGE": image,
                    "DDETR_DATA": str(data),
                    "DDETR_SECRETS": str(keys),
                    "DDETR_PORT": str(ports[0]),
                    "DDETR_SSH_PORT": str(ports[1]),
                    "DDETR_SHM": "128mb",
                }
            )
            up = subprocess.run(
                [*command, "up", "-d", "workspace", "ssh"],
                cwd=ROOT,
                env=environments[-1],
                capture_output=True,
                text=True,
            )
            assert up.returncode == 0, up.stdout + up.stderr
            names = {}
            for service, port in zip(("workspace", "ssh"), ports):
                label = f"label=com.docker.compose.service={service}"
                project_label = f"label=com.docker.compose.project={project}"
                listed = engine("ps", "--filter", label, "--filter", project_label, "--format", "{{.Names}}").stdout
                assert listed.split(), f"{service} does not run: {up.stdout}{up.stderr}"
                names[service] = Container(listed.split()[0], {8888 if service == "workspace" else 2222: port})
            found.append(names)
        for names in found:
            names["workspace"].wait_for_jupyter()
            names["ssh"].wait_for_ssh()
        yield found
    finally:
        for environment in environments:
            down = [*command, "down", "--volumes", "--timeout", "2"]
            subprocess.run(down, cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.container
def test_two_workspaces_side_by_side(pairs: list[dict[str, Container]]) -> None:
    """Each by its own port with the token of the file; what one writes, the other does not see."""
    for names in pairs:
        workspace = names["workspace"]
        assert workspace.http("GET", "/api/contents").status == 403
        assert workspace.http("GET", "/api/contents", Authorization=f"token {TOKEN}").status == 200
    one, other = (names["workspace"] for names in pairs)
    one.execute("touch", "/workspace/output/mine")
    assert one.execute("ls", "/workspace/output").stdout.split() == ["mine"]
    assert other.execute("ls", "/workspace/output").stdout.split() == []


@pytest.mark.container
def test_nothing_can_be_changed_but_output_and_home(pairs: list[dict[str, Container]]) -> None:
    for container in pairs[0].values():
        for path in ("/workspace/data/new", "/opt/ddetr/new", "/usr/local/new"):
            refused = container.execute("touch", path, check=False)
            assert refused.returncode != 0
            assert "Read-only file system" in refused.stderr, refused.stderr
        assert container.execute("cat", "/workspace/data/a_file").stdout == "some data\n"
        container.execute("touch", "/workspace/output/file", "/home/dev/file", "/tmp/file")
        # Capabilities of the container's first process, effective and permitted: none.
        status = container.execute("grep", "-E", "^(CapEff|CapPrm|NoNewPrivs)", "/proc/1/status").stdout.split()
        assert status == ["CapPrm:", "0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1"]


@pytest.mark.container
def test_the_notebooks_are_at_hand(pairs: list[dict[str, Container]]) -> None:
    listed = pairs[0]["workspace"].execute("ls", "/workspace/notebooks").stdout.split()
    assert listed == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    pairs[0]["workspace"].execute("touch", "/workspace/notebooks/new")


@pytest.mark.container
def test_the_ssh_server_lets_the_key_in(pairs: list[dict[str, Container]], keys: Path) -> None:
    for names in pairs:
        done = ssh(names["ssh"], keys / "key", "id -u; ls /workspace/data")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["1000", "a_file"]
