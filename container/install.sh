#!/usr/bin/env bash
# Runs while the image is built: install.sh core | light | workspace | test  puts that lock into /opt/venv.
#
# Locks are installed with their hashes and nothing else is. The exception is a CUDA variant that the image's locks do not hold: VARIANT=cu118
# or cu126 takes torch and torchvision from PyTorch's own index of that variant, TORCH_INDEX, without hashes.
set -euo pipefail
# shellcheck source=container/tools.sh
source /opt/ddetr/container/tools.sh
export UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 VIRTUAL_ENV=/opt/venv UV_CACHE_DIR=/root/.cache/uv
uv=$tools/bin/uv

locked() { "$uv" pip install --quiet --require-hashes --no-deps -r "$here/requirements-$1.lock"; }

# Of every package but those that come with the variant: "numpy==2.2.6 ; python_full_version < '3.11'".
pins_without_cuda() { sed -nE 's/ *\\$//; /^(nvidia-|triton==|torch==|torchvision==)/d; /^[a-z0-9]/p' "$here/requirements-core.lock"; }

# From "nvidia-cuda-runtime-cu12==12.4.127": cu124. From CUDA 13 on its name ends without a number.
locked_variant() { sed -nE 's/^nvidia-cuda-runtime(-cu[0-9]+)?==([0-9]+)\.([0-9]+)\..*/cu\2\3/p' "$here/requirements-core.lock"; }

pinned() { sed -nE "s/^$1==([^ ]+).*/\1/p" "$here/requirements-core.lock"; }

case $1 in
core | light)
    "$uv" venv --quiet --python /usr/bin/python3 /opt/venv
    export UV_COMPILE_BYTECODE=1
    if [ "$1" = light ] || [ "${VARIANT:=$(locked_variant)}" = "$(locked_variant)" ]; then
        locked "$1"
    elif [ -z "${TORCH_INDEX:-}" ]; then
        echo "install.sh: this image's lock is of $(locked_variant), and VARIANT=$VARIANT: build with make image VARIANT=$VARIANT; where that" \
            "is not on PyPI, with TORCH_INDEX=, PyTorch's own index of $VARIANT" >&2
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
*)
    echo "install.sh: core, light, workspace or test, not $1" >&2
    exit 64
    ;;
esac
rm -f /opt/venv/.lock # uv's, writable by all
