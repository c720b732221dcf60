#!/usr/bin/env bash
# Runs while the image is built. install.sh core | light | workspace | test | ddetr  puts that into /opt/venv; install.sh wheel  makes ddetr's
# wheel from /src.
#
# Locks are installed with their hashes and nothing else is. The exception is a CUDA variant that the lock does not hold: VARIANT=cu118 or
# cu126 takes torch and torchvision from PyTorch's own index, TORCH_INDEX (https://download.pytorch.org/whl/cu126), without hashes.
set -euo pipefail
here=/opt/ddetr/container
# shellcheck source=container/secrets.sh
source "$here/secrets.sh"
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 VIRTUAL_ENV=/opt/venv \
    UV_CACHE_DIR=/root/.cache/uv
uv=/opt/tools/bin/uv

# The tools lie in a cache of the engine, not in the image: made again when their lock or Python has changed.
want=$(python3 --version && sha256sum <"$here/requirements-build.lock")
if [ "$(cat /opt/tools/made-from 2>/dev/null)" != "$want" ]; then
    find /opt/tools -mindepth 1 -delete
    python3 -m venv /opt/tools
    /opt/tools/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --require-hashes --no-deps \
        -r "$here/requirements-build.lock"
    echo "$want" >/opt/tools/made-from
fi

locked() { "$uv" pip install --quiet --require-hashes --no-deps -r "$here/requirements-$1.lock"; }

# Of every package but those that come with the variant: "numpy==2.2.6 ; python_full_version < '3.11'".
pins_without_cuda() { sed -nE 's/ *\\$//; /^(nvidia-|triton==|torch==|torchvision==)/d; /^[a-z0-9]/p' "$here/requirements-core.lock"; }

pinned() { sed -nE "s/^$1==([^ ]+).*/\1/p" "$here/requirements-core.lock"; }

# uv's own --compile-bytecode would do all of the environment again, and so put all of it into the new layer.
compile_new() {
    /opt/venv/bin/python -c '
import importlib.util, pathlib, py_compile, sys
for path in sorted(pathlib.Path(sys.prefix).rglob("*.py")):
    if not pathlib.Path(importlib.util.cache_from_source(str(path))).exists():
        py_compile.compile(str(path), quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)'
}

trap 'rm -f /opt/venv/.lock' EXIT # uv's, writable by all
case $1 in
core | light)
    "$uv" venv --quiet --python /usr/bin/python3 /opt/venv
    export UV_COMPILE_BYTECODE=1
    if [ "$1" = light ] || [ "${VARIANT:=cu124}" = cu124 ]; then
        locked "$1"
    elif [ -z "${TORCH_INDEX:-}" ]; then
        echo "install.sh: VARIANT=$VARIANT is not on PyPI: give --build-arg TORCH_INDEX=, PyTorch's own index of $VARIANT" >&2
        exit 64
    else
        "$uv" pip install --index "$TORCH_INDEX" --index-strategy unsafe-best-match -r <(pins_without_cuda) \
            "torch==$(pinned torch)+$VARIANT" "torchvision==$(pinned torchvision)+$VARIANT"
    fi
    ;;
workspace | test)
    locked "$1"
    compile_new
    ;;
wheel)
    # The compiled kernel lies there already, as a file of the package.
    cd /src
    compgen -G 'ddetr/ops/native/lib/*.so' >/dev/null
    DDETR_NATIVE=0 PATH=/opt/tools/bin:$PATH hatchling build -t wheel -d /files/opt/ddetr/wheel
    ;;
ddetr)
    "$uv" pip install --quiet --no-deps --offline --no-cache /opt/ddetr/wheel/*.whl
    compile_new
    chmod 755 /usr/local/bin/ddetr-entrypoint
    ln -sfn /opt/ddetr/configs /workspace/configs
    # At hand and the user's own; a volume mounted there gets them from the engine or, where it does not, from the entrypoint.
    install -d -o 1000 -g 0 -m 2775 /workspace/notebooks
    find /opt/ddetr/notebooks -maxdepth 1 -name '*.ipynb' -exec install -o 1000 -g 0 -m 664 -t /workspace/notebooks {} +
    ;;
*)
    echo "install.sh: core, light, workspace, test, ddetr or wheel, not $1" >&2
    exit 64
    ;;
esac
