# shellcheck shell=bash
# Sourced while the image is built: what install.sh and ddetr.sh both need. Runs under set -e.
here=/opt/ddetr/container
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800}

# A network's own certificate authority and package index, from build secrets. Nothing of them is kept.
if [ -s /run/secrets/ca ]; then
    export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pipconf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pipconf
fi
if [ -s /run/secrets/uvtoml ]; then
    export UV_CONFIG_FILE=/run/secrets/uvtoml
fi

# uv and hatchling lie in a cache of the engine, not in the image: made again when their lock or Python has changed. In a folder inside it: the
# cache's own root holds the engine's lock file, and who deletes that waits for it for ever (podman 4.3).
tools=/opt/tools/venv
want=$(python3 --version && sha256sum <"$here/requirements-build.lock")
if [ "$(cat "$tools/made-from" 2>/dev/null)" != "$want" ]; then
    python3 -m venv --clear "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-compile --require-hashes --no-deps \
        -r "$here/requirements-build.lock"
    echo "$want" >"$tools/made-from"
fi

# Of what has been added. uv's own --compile-bytecode would do all of the environment again, and so put all of it into the new layer.
compile_new() {
    /opt/venv/bin/python -c '
import importlib.util, pathlib, py_compile, sys
for path in sorted(pathlib.Path(sys.prefix).rglob("*.py")):
    if not pathlib.Path(importlib.util.cache_from_source(str(path))).exists():
        py_compile.compile(str(path), quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)'
}
