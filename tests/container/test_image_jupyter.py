"""Jupyter in the container: who gets in, what stops the start. Each row of the design's table, on a hardened
container."""

import json
import re
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from light_containers import HARDENED, Container, engine

pytestmark = pytest.mark.container
TOKEN = "a-token-of-the-tests"
# What anyone could do with an open server.
ACTIONS = [("GET", "/api/contents"), ("POST", "/api/kernels"), ("POST", "/api/terminals"), ("GET", "/api/sessions")]


@pytest.fixture(scope="module")
def with_nothing_set(start: Callable[..., Container], volume: Callable[[], str]) -> Container:
    return start(*HARDENED, f"-v={volume()}:/home/dev", ports=(8888,)).wait_for_jupyter()


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "token"
    path.write_text(TOKEN + "\n", encoding="utf-8")
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def with_a_token(start: Callable[..., Container], volume: Callable[[], str], token_file: Path, data: Path) -> Container:
    return start(
        *HARDENED,
        f"-v={volume()}:/home/dev",
        f"-v={token_file}:/run/secrets/token:ro",
        f"-v={data}:/workspace/data:ro",
        "-e=JUPYTER_TOKEN_FILE=/run/secrets/token",
        ports=(8888,),
    ).wait_for_jupyter()


@pytest.mark.parametrize(("method", "path"), ACTIONS)
@pytest.mark.parametrize("header", [{}, {"Authorization": "token wrong"}, {"Authorization": "token "}], ids=str)
def test_without_the_token_nothing_is_allowed(
    with_nothing_set: Container, method: str, path: str, header: dict[str, str]
) -> None:
    assert with_nothing_set.http(method, path, b"{}" if method == "POST" else None, **header).status == 403


def test_the_token_in_the_address_must_be_right_too(with_nothing_set: Container) -> None:
    assert with_nothing_set.http("GET", "/api/contents?token=wrong").status == 403
    assert with_nothing_set.http("GET", "/api/contents?token=").status == 403


def test_nobody_is_asked_about_news(with_a_token: Container) -> None:
    path = "/lab/api/settings/@jupyterlab/apputils-extension:notification"
    answer = json.loads(with_a_token.http("GET", path, Authorization=f"token {TOKEN}").text)
    assert answer["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert answer["schema"]["properties"]["checkForUpdates"]["default"] is False


def test_the_page_leads_to_the_login(with_nothing_set: Container) -> None:
    answer = with_nothing_set.http("GET", "/lab")
    assert answer.status == 302
    assert answer.headers["Location"].startswith("/login")
    assert with_nothing_set.http("GET", "/api").status == 200, "the version alone is public"


def test_a_random_token_is_printed_and_lets_in(
    with_nothing_set: Container, start: Callable[..., Container], volume: Callable[[], str]
) -> None:
    tokens = set(re.findall(r"http://127\.0\.0\.1:8888/lab\?token=([0-9a-f]+)", with_nothing_set.logs()))
    (token,) = tokens
    assert len(token) == 48
    assert with_nothing_set.http("GET", "/api/contents", Authorization=f"token {token}").status == 200
    assert with_nothing_set.http("GET", f"/api/contents?token={token}").status == 200
    another = start(*HARDENED, f"-v={volume()}:/home/dev", ports=(8888,)).wait_for_jupyter()
    assert token not in another.logs()


def test_the_right_token_opens_a_kernel_that_computes(with_a_token: Container) -> None:
    header = {"Authorization": f"token {TOKEN}"}
    assert with_a_token.http("GET", "/api/contents", **header).status == 200
    answer = with_a_token.http("POST", "/api/kernels", b'{"name": "python3"}', **header)
    assert answer.status == 201
    kernel = json.loads(answer.text)["id"]
    ran = with_a_token.execute(
        *("python", "-c"),
        "import sys\n"
        "from jupyter_client import BlockingKernelClient, find_connection_file\n"
        "from jupyter_core.paths import jupyter_runtime_dir\n"
        f"client = BlockingKernelClient(connection_file=jupyter_runtime_dir() + '/kernel-{kernel}.json')\n"
        "client.load_connection_file(); client.start_channels(); client.wait_for_ready(timeout=30)\n"
        "client.execute_interactive('import numpy, os; print(int(numpy.arange(7).sum()), os.getuid(), os.getcwd())', "
        "timeout=30)",
    )
    assert ran.stdout.split() == ["21", "1000", "/workspace"]
    assert with_a_token.http("DELETE", f"/api/kernels/{kernel}", **header).status == 204


def test_a_given_token_is_nowhere_to_be_read(with_a_token: Container) -> None:
    assert TOKEN not in with_a_token.logs()
    assert TOKEN not in with_a_token.execute("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout


def test_the_data_cannot_be_written_to(with_a_token: Container) -> None:
    assert with_a_token.execute("cat", "/workspace/data/a_file").stdout == "some data\n"
    refused = with_a_token.execute("touch", "/workspace/data/new", check=False)
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stderr
    header = {"Authorization": f"token {TOKEN}"}
    body = json.dumps({"type": "file", "format": "text", "content": "x"}).encode()
    assert with_a_token.http("PUT", "/api/contents/data/new", body, **header).status >= 400
    assert "can be written to" not in with_a_token.logs()


def test_writable_data_is_said(start: Callable[..., Container], data: Path) -> None:
    container = start(f"-v={data}:/workspace/data", ports=(8888,)).wait_for_jupyter()
    assert "warning: /workspace/data can be written to: mount it read-only" in container.logs()


def hashed(container: Container, password: str) -> str:
    program = "import sys; from jupyter_server.auth import passwd; print(passwd(sys.argv[1]))"
    return container.execute("python", "-c", program, password).stdout.strip()


def test_a_password(
    with_a_token: Container, start: Callable[..., Container], volume: Callable[[], str], tmp_path: Path
) -> None:
    path = tmp_path / "hash"
    path.write_text(hashed(with_a_token, "open sesame"), encoding="utf-8")
    container = start(
        *HARDENED,
        f"-v={volume()}:/home/dev",
        f"-v={path}:/run/secrets/password:ro",
        "-e=JUPYTER_PASSWORD_FILE=/run/secrets/password",
        ports=(8888,),
    ).wait_for_jupyter()
    assert container.http("GET", "/api/contents").status == 403
    assert container.http("GET", "/api/contents?token=").status == 403
    assert container.http("GET", "/api/contents", Authorization="token open sesame").status == 403
    page = container.http("GET", "/login")
    xsrf = re.search(r"_xsrf=([^;]+)", page.headers["Set-Cookie"])[1]

    def log_in(password: str):
        form = urllib.parse.urlencode({"password": password, "_xsrf": xsrf}).encode()
        return container.http("POST", "/login", form, Cookie=f"_xsrf={xsrf}")

    assert log_in("wrong").status == 401
    assert log_in("").status == 401
    right = log_in("open sesame")
    assert right.status == 302
    cookies = "; ".join(cookie.split(";")[0] for cookie in right.headers.get_all("Set-Cookie"))
    assert container.http("GET", "/api/contents", Cookie=cookies).status == 200


def test_an_empty_token_stops_the_container(once: Callable) -> None:
    done = once(*HARDENED, "-e=JUPYTER_TOKEN=")
    assert done.returncode == 78
    assert "jupyter: not started: JUPYTER_TOKEN is empty, which would let everyone in" in done.stderr


@pytest.mark.parametrize(
    ("settings", "content", "said"),
    [
        ("JUPYTER_TOKEN=' '", "", "JUPYTER_TOKEN is empty, which would let everyone in"),
        ("JUPYTER_TOKEN_FILE=/tmp/it", "\n", "JUPYTER_TOKEN_FILE=/tmp/it: the file is empty"),
        ("JUPYTER_TOKEN_FILE=/nowhere", "", "JUPYTER_TOKEN_FILE=/nowhere: No such file or directory"),
        ("JUPYTER_TOKEN_FILE=", "", "JUPYTER_TOKEN_FILE="),
        ("JUPYTER_PASSWORD_FILE=/tmp/it", "\n", "JUPYTER_PASSWORD_FILE=/tmp/it: the file is empty"),
        ("JUPYTER_PASSWORD_FILE=/tmp/it", "open sesame", "must hold a hash that starts with argon2:"),
        ("JUPYTER_TOKEN=a JUPYTER_TOKEN_FILE=/tmp/it", "b", "are both set; set one"),
    ],
)
def test_a_setting_that_would_open_it_stops_the_start(
    with_nothing_set: Container, settings: str, content: str, said: str
) -> None:
    """In a container that runs already, which is quicker; on another port, which is not reached."""
    script = f"printf %s '{content}' >/tmp/it; env JUPYTER_PORT=9999 {settings} timeout 30 jupyter lab"
    done = with_nothing_set.execute("bash", "-c", script, check=False)
    assert done.returncode == 78, done.stderr
    assert "jupyter: not started: " in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "open sesame" not in done.stderr


@pytest.mark.parametrize(
    "option", ["--IdentityProvider.token=", "--ServerApp.token=", "--PasswordIdentityProvider.token="]
)
def test_the_command_line_cannot_open_it_either(with_nothing_set: Container, option: str) -> None:
    command = ("env", "JUPYTER_PORT=9999", "timeout", "30", "jupyter", "lab", option)
    done = with_nothing_set.execute(*command, check=False)
    assert done.returncode == 78, done.stderr
    assert "no token and no password is set" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_arbitrary_user_on_a_read_only_root(start: Callable[..., Container]) -> None:
    container = start(*HARDENED, "--user=12345:0", "-e=JUPYTER_TOKEN=" + TOKEN, ports=(8888,)).wait_for_jupyter()
    assert container.execute("id", "-u").stdout.strip() == "12345"
    header = {"Authorization": f"token {TOKEN}"}
    assert container.http("POST", "/api/kernels", b"{}", **header).status == 201
    assert container.http("POST", "/api/terminals", b"{}", **header).status == 200
    (effective,) = re.findall(r"CapEff:\s*(\w+)", container.execute("cat", "/proc/self/status").stdout)
    assert int(effective, 16) == 0
    assert container.execute("/usr/local/bin/ddetr-entrypoint", "healthcheck").returncode == 0


def test_it_is_healthy_while_it_answers(with_a_token: Container, start: Callable[..., Container]) -> None:
    check = ("/usr/local/bin/ddetr-entrypoint", "healthcheck")
    assert with_a_token.execute(*check).returncode == 0
    # Of Jupyter alone: a job of one's own is healthy while it runs.
    assert start(command=("sleep", "60")).execute(*check).returncode == 0
    assert with_a_token.execute("env", "JUPYTER_PORT=9999", *check, check=False).returncode == 1, "nothing is there"


def test_it_stops_when_asked(start: Callable[..., Container]) -> None:
    container = start(ports=(8888,)).wait_for_jupyter()
    begun = time.monotonic()
    engine("stop", "--time=60", container.name)
    assert time.monotonic() - begun < 60, "the signal reached Jupyter: nothing had to be killed"
    assert container.exit_code() == 0
