"""The container engine, a started container, and how to wait for it; the fixtures are in conftest.py."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "container" / "engine.sh"
IMAGE = "pytorch-cuda:v2.6-light"
HARDENED = ("--cap-drop=all", "--security-opt=no-new-privileges", "--read-only", "--tmpfs=/tmp:exec")
# In every secret of the build: where it turns up in the image, a secret was kept.
CANARY = "canary-of-the-build-secrets-3f9d1c"


def engine(*arguments: str, check: bool = True, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
    """Run the container engine; its output is in `stdout` and `stderr`."""
    done = subprocess.run(
        [str(ENGINE), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout, **options
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@cache
def is_podman() -> bool:
    return engine("--name").stdout.strip() == "podman"


def wait_for(what: Callable[[], Any], description: str, timeout: float = 60) -> Any:
    """The first true value of `what()`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout:.0f} s for {description}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Answer(NamedTuple):
    """An HTTP answer; redirects are not followed."""

    status: int
    headers: Any
    text: str


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Container:
    """A running (or ended) container of the light image."""

    def __init__(self, name: str, ports: dict[int, int]) -> None:
        self.name = name
        self.ports = ports

    def logs(self) -> str:
        done = engine("logs", self.name)
        return done.stdout + done.stderr

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        return engine("exec", self.name, *command, check=check)

    def exit_code(self) -> int:
        """Waits for the end."""
        return int(engine("wait", self.name).stdout.split()[-1])

    def is_running(self) -> bool:
        return engine("inspect", "--format", "{{.State.Running}}", self.name).stdout.strip() == "true"

    def http(self, method: str, path: str, data: bytes | None = None, **headers: str) -> Answer:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[8888]}{path}", data=data, method=method, headers=headers
        )
        try:
            with opener.open(request, timeout=30) as answer:
                return Answer(answer.status, answer.headers, answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read().decode())

    def wait_for_jupyter(self) -> "Container":
        def answers() -> bool:
            assert self.is_running(), f"the container ended:\n{self.logs()}"
            try:
                return self.http("GET", "/api").status == 200
            except OSError:
                return False

        wait_for(answers, "Jupyter's answer")
        return self

    def wait_for_ssh(self) -> "Container":
        def answers() -> bool:
            assert self.is_running(), f"the container ended:\n{self.logs()}"
            try:
                with socket.create_connection(("127.0.0.1", self.ports[2222]), timeout=5) as connection:
                    return connection.recv(8).startswith(b"SSH-2.0")
            except OSError:
                return False

        wait_for(answers, "sshd's answer")
        return self


def key(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / f"{name}.pub").chmod(0o644)
    return folder / name


def options(container: Container, key: Path | None, *more: str) -> list[str]:
    return [
        *("-F", os.devnull, "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={os.devnull}"),
        *("-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "LogLevel=ERROR"),
        *(["-i", str(key)] if key else ["-o", "IdentityFile=none"]),
        *("-o", f"Port={container.ports[2222]}", *more),
    ]


def ssh(
    container: Container, key: Path | None, command: str, *more: str, user: str = "dev"
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["ssh", *options(container, key, *more), f"{user}@127.0.0.1", command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
