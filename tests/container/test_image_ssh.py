"""The SSH server in the container, with a real client: who gets in, what stops the start. On a hardened container."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from light_containers import HARDENED, Container, engine, key, options, ssh

pytestmark = pytest.mark.container
DENIED = 255
# What the quotes of sshd's configuration could break or change.
HOSTILE = {
    "CUDA_X": "C:\\",
    "CUDA_NOTE": "two words",
    "DDETR_A": '"',
    "DDETR_B": "\\\" \\\\ 'a b' \\n",
    "DDETR_C": "",
    "DDETR_D": " \t # $HOME `id` $(id) %h ~ * ",
    "DDETR_E": "\u00e9\u6f22\U0001f600\u202e",
    "DDETR_F": "\f\v\x01\x1b[31m\x7f",
    "DDETR_LONG": "\\x" * 30_000,
    "DDETR_lower.and-other": "Match all",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, ssh_client: str) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: key(folder, name) for name in ("right", "wrong")}


@pytest.fixture(scope="module")
def server(start: Callable[..., Container], volume: Callable[[], str], keys: dict[str, Path], data: Path) -> Container:
    return start(
        *HARDENED,
        f"-v={volume()}:/home/dev",
        f"-v={data}:/workspace/data:ro",
        f"-v={keys['right']}.pub:/run/secrets/keys:ro",
        "-e=AUTHORIZED_KEYS_FILE=/run/secrets/keys",
        "-e=NCCL_DEBUG=WARN",
        *(f"-e={name}={value}" for name, value in HOSTILE.items()),
        "-e=DDETR_TEXT=hidden\nPermitRootLogin yes",
        command=("ssh",),
        ports=(2222,),
    ).wait_for_ssh()


def test_the_right_key_gets_in_as_uid_1000(server: Container, keys: dict[str, Path]) -> None:
    done = ssh(server, keys["right"], "id -u; command -v python; cat /workspace/data/a_file; ddetr --version")
    assert done.returncode == 0, done.stderr
    uid, python, content, version = done.stdout.splitlines()
    assert (uid, python, content) == ("1000", "/opt/venv/bin/python", "some data")
    assert version.startswith("ddetr ")


def test_a_session_has_the_environment_of_the_image(server: Container, keys: dict[str, Path]) -> None:
    lines = ssh(server, keys["right"], "env").stdout.splitlines()
    for expected in (
        *("NCCL_DEBUG=WARN", "NVIDIA_VISIBLE_DEVICES=all", "LANG=C.UTF-8", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
    ):
        assert expected in lines
    assert not [line for line in lines if line.startswith(("AUTHORIZED_KEYS", "JUPYTER_"))]


def test_every_value_arrives_as_it_was_given(server: Container, keys: dict[str, Path]) -> None:
    pairs = dict(pair.split("=", 1) for pair in ssh(server, keys["right"], "env -0").stdout.split("\0")[:-1])
    assert {name: pairs.get(name) for name in HOSTILE} == HOSTILE
    assert "DDETR_TEXT" not in pairs
    warnings = [line for line in server.logs().splitlines() if "SSH sessions" in line]
    assert warnings == [
        "warning: SSH sessions do not have DDETR_TEXT: its value has a line break, which sshd cannot pass on"
    ]


def test_no_value_is_for_others_to_read(server: Container) -> None:
    lines = server.execute("ps", "-ww", "-eo", "args").stdout
    assert "sshd" in lines
    assert "two words" not in lines
    assert "SetEnv" not in lines
    assert server.execute("stat", "-c", "%a %U", "/home/dev/.sshd/sshd_config").stdout == "600 dev\n"


def test_a_terminal_and_file_transfer(server: Container, keys: dict[str, Path], tmp_path: Path) -> None:
    assert ssh(server, keys["right"], "tty", "-tt").stdout.startswith("/dev/pts/")
    batch = tmp_path / "batch"
    batch.write_text(f"get /workspace/data/a_file {tmp_path / 'fetched'}\n", encoding="utf-8")
    subprocess.run(
        ["sftp", *options(server, keys["right"]), "-b", str(batch), "dev@127.0.0.1"], check=True, capture_output=True
    )
    assert (tmp_path / "fetched").read_text() == "some data\n"


@pytest.mark.parametrize(
    ("which", "user", "more"),
    [
        ("wrong", "dev", ()),
        ("right", "root", ()),
        ("right", "nobody", ()),
        (None, "dev", ("-o", "PreferredAuthentications=password", "-o", "PubkeyAuthentication=no")),
        (None, "dev", ("-o", "PreferredAuthentications=keyboard-interactive", "-o", "PubkeyAuthentication=no")),
        (None, "dev", ("-o", "PreferredAuthentications=none")),
    ],
    ids=["wrong key", "root", "another user", "password", "keyboard-interactive", "nothing"],
)
def test_everyone_else_is_refused(
    server: Container, keys: dict[str, Path], which: str | None, user: str, more: tuple[str, ...]
) -> None:
    done = ssh(server, keys[which] if which else None, "id", *more, user=user)
    assert done.returncode == DENIED
    assert "Permission denied (publickey)" in done.stderr, "and keys are all that is offered"
    assert done.stdout == ""


def test_an_empty_password_with_a_prompt_is_refused(server: Container) -> None:
    """As a client that answers every question with an empty line."""
    helper = {"SSH_ASKPASS": "/bin/true", "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
    done = subprocess.run(
        ["ssh", *options(server, None, "-o", "BatchMode=no", "-o", "PubkeyAuthentication=no"), "dev@127.0.0.1", "id"],
        env=os.environ | helper,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == DENIED
    assert "Permission denied (publickey)" in done.stderr


def test_the_data_cannot_be_written_to(server: Container, keys: dict[str, Path]) -> None:
    done = ssh(server, keys["right"], "touch /workspace/data/new")
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr


def test_it_is_healthy_while_it_answers(server: Container) -> None:
    check = ("/usr/local/bin/ddetr-entrypoint", "healthcheck")
    assert server.execute(*check).returncode == 0
    assert server.execute("env", "SSH_PORT=2223", *check, check=False).returncode == 1


def fingerprint(container: Container) -> str:
    (found,) = set(re.findall(r"host key (SHA256:\S+)", container.logs()))
    return found


def test_the_host_key_is_the_containers_own_and_stays(
    server: Container, start: Callable[..., Container], volume: Callable[[], str], keys: dict[str, Path]
) -> None:
    home = volume()
    public = keys["right"].with_suffix(".pub").read_text()
    shared = (f"-v={home}:/home/dev", f"-e=AUTHORIZED_KEYS={public}")
    first = start(*shared, command=("ssh",), ports=(2222,)).wait_for_ssh()
    again = start(*shared, command=("ssh",), ports=(2222,)).wait_for_ssh()
    assert fingerprint(first) == fingerprint(again), "a new container with the same home"
    assert fingerprint(server) != fingerprint(first), "another home"
    scanned = subprocess.run(
        ["ssh-keyscan", "-p", str(first.ports[2222]), "127.0.0.1"], capture_output=True, text=True, check=True
    ).stdout
    kinds = {line.split()[1] for line in scanned.splitlines() if not line.startswith("#")}
    assert kinds == {"ssh-ed25519"}
    assert ssh(first, keys["right"], "id -u").stdout == "1000\n", "keys from the environment"
    mode = first.execute("stat", "-c", "%a %U", "/home/dev/.sshd", "/home/dev/.sshd/ssh_host_ed25519_key").stdout
    assert mode.splitlines() == ["700 dev", "600 dev"]


def test_mounted_keys_in_the_usual_place(start: Callable[..., Container], keys: dict[str, Path]) -> None:
    container = start(
        f"-v={keys['right']}.pub:/home/dev/.ssh/authorized_keys:ro", command=("ssh",), ports=(2222,)
    ).wait_for_ssh()
    assert ssh(container, keys["right"], "id -u").stdout == "1000\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "no keys: give AUTHORIZED_KEYS_FILE"),
        (("-e=AUTHORIZED_KEYS=",), "no keys: give AUTHORIZED_KEYS_FILE"),
        (("-e=AUTHORIZED_KEYS=hello",), "the authorized keys hold no public key"),
        (("-e=AUTHORIZED_KEYS_FILE=/nowhere",), "AUTHORIZED_KEYS_FILE=/nowhere is not a file that uid 1000 can read"),
        (("--read-only", "--tmpfs=/tmp", "-e=AUTHORIZED_KEYS=x"), "/home/dev cannot be written to"),
        (("--user=0:0", "-e=AUTHORIZED_KEYS=x"), "it does not run as root"),
    ],
    ids=["no keys", "empty", "not a key", "no such file", "no home to write to", "root"],
)
def test_what_stops_the_start(once: Callable, given: tuple[str, ...], said: str) -> None:
    done = once(*given, command=("ssh",))
    assert done.returncode == 64, done.stderr
    assert "ssh: not started: " in done.stderr
    assert said in done.stderr


def test_a_private_key_by_mistake(once: Callable, keys: dict[str, Path]) -> None:
    done = once(f"-e=AUTHORIZED_KEYS={keys['right'].read_text()}", command=("ssh",))
    assert done.returncode == 64
    assert "the authorized keys hold a private key: give the public one" in done.stderr
    assert "PRIVATE KEY" not in done.stderr


def test_an_arbitrary_user_is_told(once: Callable) -> None:
    """podman gives the uid a name and no home; Docker gives it neither: either way a sentence, and not a broken
    server."""
    done = once(*HARDENED, "--user=12345:0", "-e=AUTHORIZED_KEYS=x", command=("ssh",))
    assert done.returncode == 64
    assert re.search("ssh: not started: (uid 12345 has no name|.* cannot be written to)", done.stderr)


def test_it_stops_when_asked(start: Callable[..., Container], keys: dict[str, Path]) -> None:
    public = keys["right"].with_suffix(".pub").read_text()
    container = start(f"-e=AUTHORIZED_KEYS={public}", command=("ssh",), ports=(2222,)).wait_for_ssh()
    engine("stop", "--time=60", container.name)
    assert container.exit_code() in (0, 255), "ended by the signal, not killed (137)"
