"""The light image itself: who it runs as, what is in it and, more, what is not; commands, notebooks, data."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from light_containers import CANARY, ENGINE, HARDENED, ROOT, Container, engine, is_podman

pytestmark = pytest.mark.container
VERSIONS = json.loads((ROOT / "container" / "versions.json").read_text(encoding="utf-8"))
VARIANT = VERSIONS["variants"][VERSIONS["image"]["default_variant"]]


def test_it_runs_as_uid_1000(once: Callable, settings: dict[str, Any]) -> None:
    assert settings["Config"]["User"] == "1000:100", "by number, which Kubernetes' runAsNonRoot can check"
    assert once(command=("id",)).stdout == "uid=1000(dev) gid=100(users) groups=100(users)\n"
    assert once(command=("sh", "-c", "command -v sudo doas pkexec")).returncode != 0


def test_the_settings(settings: dict[str, Any]) -> None:
    config = settings["Config"]
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert not [name for name in environment if re.search("TOKEN|PASSWORD|KEY|PROXY|INDEX|CERT", name, re.IGNORECASE)]
    assert config["Cmd"] == ["jupyter"]
    assert config["Entrypoint"][0].endswith("tini")
    assert set(config["ExposedPorts"]) == {"8888/tcp", "2222/tcp"}
    assert not config.get("Volumes"), "each would leave an unnamed volume behind"
    assert settings.get("HealthCheck") or settings.get("Healthcheck") or config.get("Healthcheck")


def test_the_labels(settings: dict[str, Any]) -> None:
    labels = settings["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == VARIANT["tag"]
    assert labels["ddetr.torch"] == VARIANT["torch"]
    assert labels["ddetr.torchvision"] == VARIANT["torchvision"]
    assert (labels["ddetr.cuda"], labels["ddetr.cudnn"]) == (VARIANT["cuda"], VARIANT["cudnn"])
    assert labels["ddetr.lock"] == "light"
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    base = labels["org.opencontainers.image.base.name"]
    assert base == "localhost/debian:trixie" or base.startswith(VERSIONS["image"]["base"])


def test_what_is_in_it(once: Callable) -> None:
    done = once(command=("sh", "-c", "python --version; ddetr --version; gcc --version; g++ --version; git --version"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Python {VERSIONS['image']['python']}.")
    program = "import importlib.util as u; print([n for n in ('torch', 'jupyterlab', 'numpy') if u.find_spec(n)])"
    assert once(command=("python", "-c", program)).stdout == "['jupyterlab', 'numpy']\n"
    kernel = (
        "from importlib.resources import files; print([p.name for p in (files('ddetr')/'ops/native/lib').iterdir()])"
    )
    assert "msda-linux-" in once(command=("python", "-c", kernel)).stdout, "ddetr's wheel brings its compiled kernel"


def test_the_installed_versions_are_those_of_the_locks(once: Callable) -> None:
    program = (
        "import json, importlib.metadata as m;"
        "print(json.dumps({d.name.lower().replace('_', '-').replace('.', '-'): d.version for d in m.distributions()}))"
    )
    installed = json.loads(once(command=("python", "-c", program)).stdout)
    assert installed.pop("ddetr")
    allowed: dict[str, set[str]] = {}
    for lock in ("light", "workspace"):
        text = (ROOT / "container" / VARIANT["tag"] / f"requirements-{lock}.lock").read_text(encoding="utf-8")
        for name, version in re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE):
            allowed.setdefault(name.replace(".", "-").replace("_", "-"), set()).add(version)
    assert len(installed) > 50
    assert {name: version for name, version in installed.items() if version not in allowed.get(name, ())} == {}


def test_a_command_takes_the_place_of_jupyter(once: Callable) -> None:
    done = once(*HARDENED, command=("ddetr", "--help"))
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert once(*HARDENED, command=("sh", "-c", "exit 7")).returncode == 7, "its exit code is the container's"
    assert once(*HARDENED, command=("no-such-command",)).returncode == 127


@pytest.mark.parametrize("user", ["1000:100", "12345:0"])
def test_a_read_only_root_has_a_home_to_write_to(once: Callable, user: str) -> None:
    program = "import getpass, pathlib; p = pathlib.Path.home() / 'x'; p.write_text('x'); print(getpass.getuser(), p)"
    done = once(*HARDENED, f"--user={user}", command=("python", "-c", program))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == f"/tmp/home-{user.split(':')[0]}/x"


def test_without_anything_to_write_to_it_says_so(once: Callable) -> None:
    # podman alone brings a /tmp of its own
    done = once("--read-only", *(["--read-only-tmpfs=false"] if is_podman() else []), command=("true",))
    assert "with --read-only give --tmpfs /tmp" in done.stderr


def test_nothing_is_writable_but_the_workspace(once: Callable) -> None:
    """By uid 1000, outside of what the kernel and the engine mount."""
    command = "find / -xdev -writable ! -type l ! -path '/proc/*' ! -path '/dev/*' ! -path '/sys/*' 2>/dev/null | sort"
    found = once(command=("sh", "-c", command)).stdout.splitlines()
    outside = [path for path in found if not path.startswith(("/home/dev", "/workspace/", "/tmp", "/var/tmp"))]
    assert [path for path in outside if path not in ("/workspace", "/run/lock", "/etc/mtab")] == []
    assert "/workspace/output" in found
    assert "/workspace/data" not in found, "data that nobody mounted are not to be written either"


def test_no_file_gives_its_rights_to_who_starts_it(once: Callable) -> None:
    """The program that takes them finds nothing more, on a root that is read-only: it could but fail."""
    command = "find / -xdev -perm /6000 -type f && python3 -B /opt/ddetr/container/drop_rights.py"
    done = once("--user=0", "--read-only", "--tmpfs=/tmp:exec", command=("sh", "-c", command))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_variables_of_kubernetes_services_are_no_ports(start: Callable[..., Container]) -> None:
    """A service that is called jupyter sets JUPYTER_PORT for every pod, and not to a number."""
    container = start("-e=JUPYTER_PORT=tcp://10.0.0.1:8888", "-e=SSH_PORT=tcp://10.0.0.1:2222", ports=(8888,))
    container.wait_for_jupyter()
    assert container.execute("/usr/local/bin/ddetr-entrypoint", "healthcheck", check=False).returncode == 0


def test_writable_data_is_said_for_a_command_too(once: Callable, data: Path) -> None:
    written = once(f"-v={data}:/workspace/data", command=("cat", "/workspace/data/a_file"))
    assert written.stdout == "some data\n"
    assert "warning: /workspace/data can be written to" in written.stderr
    assert "warning" not in once(f"-v={data}:/workspace/data:ro", command=("true",)).stderr
    assert "warning" not in once(command=("true",)).stderr


def test_the_recipes_and_the_notebooks_are_at_hand(once: Callable) -> None:
    assert "configs/cpu_small.yaml" in once(command=("sh", "-c", "ls configs/*.yaml")).stdout
    ours = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(once(command=("ls", "notebooks")).stdout.split()) == ours
    assert once(command=("touch", "notebooks/mine.ipynb")).returncode == 0


def test_an_empty_folder_gets_the_notebooks(start: Callable[..., Container], tmp_path: Path) -> None:
    ours = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    if not ours:
        pytest.skip("the project has no notebooks yet")
    tmp_path.chmod(0o777)
    container = start(*HARDENED, f"-v={tmp_path}:/workspace/notebooks", ports=(8888,)).wait_for_jupyter()
    assert set(container.execute("ls", "/workspace/notebooks").stdout.split()) == ours
    (tmp_path / min(ours)).unlink()
    again = start(*HARDENED, f"-v={tmp_path}:/workspace/notebooks", ports=(8888,)).wait_for_jupyter()
    assert min(ours) not in again.execute("ls", "/workspace/notebooks").stdout, "what was removed stays so"


@pytest.mark.skipif(not (ROOT / "ddetr" / "doctor" / "__init__.py").exists(), reason="there is no doctor yet")
def test_the_doctor_has_the_first_lines(start: Callable[..., Container]) -> None:
    logs = start(*HARDENED, ports=(8888,)).wait_for_jupyter().logs()
    before = logs[: logs.index("ServerApp]")]
    assert len(before.splitlines()) > 3
    assert "Traceback" not in before
    assert "no command" not in before


@pytest.fixture(scope="module")
def layers(image: str, tmp_path_factory: pytest.TempPathFactory) -> list[tarfile.TarFile]:
    """The image's layers, as they would be pushed."""
    path = tmp_path_factory.mktemp("saved") / "image.tar"
    with path.open("wb") as file:
        subprocess.run([str(ENGINE), "save", image], stdout=file, check=True, stderr=subprocess.DEVNULL)
    with tarfile.open(path) as saved:
        (manifest,) = json.load(saved.extractfile("manifest.json"))
        names = manifest["Layers"]
        assert len(names) >= 5
        return [tarfile.open(fileobj=io.BytesIO(saved.extractfile(name).read())) for name in names]


def files(layers: list[tarfile.TarFile]) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
    for layer in layers:
        for member in layer.getmembers():
            yield "/" + member.name.removeprefix("./").lstrip("/"), layer, member


def test_no_key_token_or_authority_is_in_a_layer(layers: list[tarfile.TarFile]) -> None:
    """In any layer: a file that a later one removes can be read all the same."""
    suspicious = re.compile(
        r"/ssh_host_|/authorized_keys$|/id_(rsa|dsa|ecdsa|ed25519)|/\.ssh/.|/pip\.conf$|/uv\.toml$|/\.netrc$|/\.pypirc$"
        r"|jupyter_cookie_secret|jpserver-|notebook_secret|/run/secrets/.|/\.git(/|$)|/root/\.cache/.|/opt/tools/."
        r"|/var/lib/apt/lists/(?!lock$|partial$|auxfiles$).|\.deb$"
    )
    found, canaries, private = [], [], []
    number = 0
    for path, layer, member in files(layers):
        number += 1
        if suspicious.search(path) and "/.wh." not in path:  # not the mark of something that a layer removes
            found.append(path)
        if member.isfile():
            content = layer.extractfile(member).read()
            if CANARY.encode() in content:
                canaries.append(path)
            if re.search(rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}", content, re.MULTILINE):
                private.append(path)
    assert number > 5000
    assert found == []
    assert canaries == []
    # Tornado's own, public, of its tests.
    assert [path for path in private if not path.endswith("/site-packages/tornado/test/test.key")] == []


def certificates(text: str) -> set[str]:
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END", text, re.DOTALL)
    return {hashlib.sha256("".join(block.split()).encode()).hexdigest() for block in blocks}


def test_the_builders_authorities_are_not_in_the_image(layers: list[tarfile.TarFile]) -> None:
    bundles = {path: (layer, member) for path, layer, member in files(layers) if path.endswith("ca-certificates.crt")}
    packaged = {path for path, _, member in files(layers) if path.startswith("/usr/share/ca-certificates/mozilla/")}
    (layer, member) = bundles["/etc/ssl/certs/ca-certificates.crt"]
    bundled = certificates(layer.extractfile(member).read().decode())
    assert len(bundled) > 100
    assert len(bundled) <= len(packaged), "Debian's own, and no other"


def test_its_history_names_no_secret(settings: dict[str, Any]) -> None:
    assert CANARY not in json.dumps(settings)
    assert not re.search(r"https?://(?!download\.pytorch\.org)", json.dumps(settings.get("History") or ""))


@pytest.mark.slow
def test_two_builds_have_the_same_layers(build: Callable[..., None], image: str, settings: dict[str, Any]) -> None:
    again = f"{image}-again"
    build(again, "--no-cache")
    try:
        other = json.loads(engine("image", "inspect", again).stdout)[0]
        assert other["RootFS"]["Layers"] == settings["RootFS"]["Layers"]
    finally:
        engine("rmi", "--force", again, check=False)
