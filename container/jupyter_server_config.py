"""Jupyter in the container: never without a token or a password, whatever sets them.

JUPYTER_TOKEN or JUPYTER_TOKEN_FILE (a path) is the token; JUPYTER_PASSWORD_FILE is a path to a password's hash, as
`python -c "from jupyter_server.auth import passwd; print(passwd())"` prints it. With none of them a random token is
made and printed. An empty one stops the start.
"""

import os
import sys
from pathlib import Path

from jupyter_server.auth.identity import PasswordIdentityProvider

# 78: wrong configuration, of sysexits.h.
WRONG_CONFIGURATION = 78


def stop(message):
    sys.stderr.write(f"jupyter: not started: {message}\n")
    raise SystemExit(WRONG_CONFIGURATION)


def read_secret(variable):
    """The text of the file that the variable names; None where the variable is not set."""
    if variable not in os.environ:
        return None
    path = os.environ[variable]
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        stop(f"{variable}={path}: {reason}; it must be a file that uid {os.getuid()} can read")
    if not text:
        stop(f"{variable}={path}: the file is empty")
    return text


class GuardedIdentityProvider(PasswordIdentityProvider):
    """Refuses to serve without a token or a password, also where the command line or another file emptied them."""

    def validate_security(self, app, ssl_options=None):
        super().validate_security(app, ssl_options)
        if not self.auth_enabled:
            stop("no token and no password is set, so everyone who reaches the port could run commands")


c = get_config()  # noqa: F821
c.ServerApp.identity_provider_class = GuardedIdentityProvider
# Inside the container: what is reached from outside, the published port decides.
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = int(os.environ.get("JUPYTER_PORT", "8888"))
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.root_dir = "/workspace"
c.ServerApp.terminado_settings = {"shell_command": ["/bin/bash"]}
# The environment is fixed: nothing is fetched to look for news or to install into it.
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None
c.LabApp.extension_manager = "readonly"
c.LabApp.app_settings_dir = "/opt/ddetr/container/lab_settings"  # nobody is asked about news either
c.LanguageServerManager.autodetect = False

if os.environ.get("JUPYTER_TOKEN", "-").strip() == "":
    stop("JUPYTER_TOKEN is empty, which would let everyone in; leave it out to have a random one, or set it")
token = read_secret("JUPYTER_TOKEN_FILE")
password = read_secret("JUPYTER_PASSWORD_FILE")
if token is not None:
    if "JUPYTER_TOKEN" in os.environ:
        stop("JUPYTER_TOKEN and JUPYTER_TOKEN_FILE are both set; set one")
    c.IdentityProvider.token = token
if password is not None:
    if not password.startswith("argon2:"):
        stop(
            "JUPYTER_PASSWORD_FILE must hold a hash that starts with argon2: (see jupyter_server.auth.passwd), not the "
            "password itself"
        )
    c.PasswordIdentityProvider.hashed_password = password
    c.PasswordIdentityProvider.allow_password_change = False
    if token is None and "JUPYTER_TOKEN" not in os.environ:
        c.IdentityProvider.token = ""
