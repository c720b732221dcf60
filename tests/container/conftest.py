"""Containers of the light image, started as a user starts them, with ports, volumes and secrets; removed afterwards."""

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from light_containers import CANARY, IMAGE, ROOT, Container, engine, free_port, is_podman

# A build from nothing takes one to two minutes on two quiet cores. Without a limit of its own a build that hangs holds
# everything up and names nothing.
BUILD_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "build" in getattr(item, "fixturenames", ()):  # in the time of the first test that wants it
            item.add_marker(pytest.mark.timeout(BUILD_SECONDS + 300))


def soon() -> tuple[str, ...]:
    """For `rm`: Docker kills at once, podman waits ten seconds."""
    return ("--time=1",) if is_podman() else ()


@pytest.fixture(scope="session")
def usable_engine() -> str:
    """The engine's name; skips where this machine cannot run a container, unless DDETR_CONTAINER=required."""

    def absent(reason: str) -> None:
        if os.environ.get("DDETR_CONTAINER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)

    named = engine("--name", check=False)
    if named.returncode:
        absent(named.stderr.strip())
    information = engine("info", check=False)
    if information.returncode:
        absent(f"the container engine does not work here: {information.stderr.strip()[-500:]}")
    return named.stdout.strip()


@pytest.fixture(scope="session")
def build(usable_engine: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`build(NAME, *options)` builds the light image as `make image-light` does, with a canary in each secret."""
    folder = tmp_path_factory.mktemp("secrets")
    lock = tmp_path_factory.getbasetemp().parent / "build.lock"  # of all workers of pytest-xdist
    authorities = os.environ.get("CA") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    environment = os.environ | {"LOCK": "light"}
    for variable, name, text in (
        ("CA", "ca.pem", Path(authorities).read_text(encoding="utf-8") + f"\n# {CANARY}\n"),
        ("PIPCONF", "pip.conf", f"[global]\n# {CANARY}\nretries = 5\n"),
        ("UVTOML", "uv.toml", f"# {CANARY}\nconcurrent-downloads = 8\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        environment[variable] = str(folder / name)

    def run(name: str, *options: str) -> None:
        log = folder / "build.log"
        with lock.open("w") as one_at_a_time, log.open("w+b") as output:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            process = subprocess.Popen(
                [str(ROOT / "container" / "build.sh"), "workspace", name, *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(BUILD_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"not done after {BUILD_SECONDS} s"
        last = log.read_text(encoding="utf-8", errors="replace")[-6000:]
        assert code == 0, f"the image was not built ({code}); the last that the build said:\n{last}"

    return run


@pytest.fixture(scope="session")
def image(build: Callable[..., None]) -> str:
    """The light image, built from this working tree."""
    build(IMAGE)
    return IMAGE


@pytest.fixture(scope="session")
def settings(image: str) -> dict[str, Any]:
    """What `inspect` says of the image."""
    return json.loads(engine("image", "inspect", image).stdout)[0]


@pytest.fixture(scope="session")
def no_healthcheck(usable_engine: str) -> tuple[str, ...]:
    # podman asks systemd to run it, and says so where there is none.
    return ("--no-healthcheck",)


@pytest.fixture(scope="module")
def start(image: str, no_healthcheck: tuple[str, ...]) -> Iterator[Callable[..., Container]]:
    """`start(*options, command=[...], ports=[8888])` starts a container on free ports of 127.0.0.1."""
    started = []

    def run(*options: str, command: tuple[str, ...] = (), ports: tuple[int, ...] = ()) -> Container:
        name = f"ddetr-test-{secrets.token_hex(4)}"
        published = {port: free_port() for port in ports}
        publish = [f"--publish=127.0.0.1:{outside}:{inside}" for inside, outside in published.items()]
        started.append(name)
        engine("run", "--detach", f"--name={name}", *no_healthcheck, *publish, *options, image, *command)
        return Container(name, published)

    yield run
    for name in started:
        engine("rm", "--force", *soon(), "--volumes", name, check=False)


@pytest.fixture(scope="module")
def volume(usable_engine: str) -> Iterator[Callable[[], str]]:
    """`volume()` is the name of a new volume."""
    made = []

    def make() -> str:
        made.append(f"ddetr-test-{secrets.token_hex(4)}")
        engine("volume", "create", made[-1])
        return made[-1]

    yield make
    for name in made:
        engine("volume", "rm", "--force", name, check=False)


@pytest.fixture(scope="module")
def once(image: str, no_healthcheck: tuple[str, ...]) -> Callable[..., subprocess.CompletedProcess]:
    """`once(*options, command=[...])` runs a container to its end; does not raise when it fails."""

    def run(*options: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        name = f"ddetr-test-{secrets.token_hex(4)}"
        try:
            return engine("run", "--rm", f"--name={name}", *no_healthcheck, *options, image, *command, check=False)
        except subprocess.TimeoutExpired:  # what should have ended serves
            engine("rm", "--force", *soon(), name, check=False)
            raise

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to mount at /workspace/data, with one file in it; anyone may write to it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a_file").write_text("some data\n", encoding="utf-8")
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def ssh_client() -> str:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh client on this machine")
    return "ssh"
