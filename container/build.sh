#!/usr/bin/env bash
# Builds the image: container/build.sh TARGET NAME [OPTION of the engine's build ...]
#
# From the environment (make passes its own on: make image VARIANT=cu126 TORCH_INDEX=...):
#   BASE_IMAGE    default: the one of versions.json, by digest; where no registry is reached, one made by base.sh
#   LOCK          core (default), or light: without PyTorch
#   VARIANT       cu124 (default, locked); cu130 (a newer PyTorch, for Blackwell, locked); cu118, cu126 with TORCH_INDEX
#   CA            certificate authorities of your network, a PEM file (default: $SSL_CERT_FILE)
#   PIPCONF       a pip.conf that names your package index, for uv's installation
#   UVTOML        a uv.toml that names it, for everything else
# CA, PIPCONF and UVTOML are secrets of the build: nothing of them is in the image.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$1 name=$2
shift 2
python=${PYTHON:-python3}
engine=$("$here/engine.sh" --name)

if [ -z "${BASE_IMAGE:-}" ]; then
    pinned=$("$python" "$here/build_arguments.py" | sed -n 's/^BASE_IMAGE=//p')
    if ! "$here/engine.sh" image inspect "$pinned" >/dev/null 2>&1 && ! "$here/engine.sh" pull --quiet "$pinned" >/dev/null 2>&1; then
        BASE_IMAGE=localhost/debian:trixie
        echo "container/build.sh: $pinned cannot be pulled; the base is $BASE_IMAGE, made of Debian's packages" >&2
        if ! "$here/engine.sh" image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
            if ! command -v mmdebstrap >/dev/null; then
                echo "container/build.sh: that takes mmdebstrap (container/prepare.sh installs it); or name a base of your own with BASE_IMAGE=" >&2
                exit 69
            fi
            "$here/base.sh" trixie "$BASE_IMAGE"
        fi
    fi
fi

options=()
while IFS= read -r argument; do
    options+=(--build-arg "$argument")
done < <("$python" "$here/build_arguments.py" "${VARIANT:-}" "${BASE_IMAGE:-}")
[ "${#options[@]}" -gt 0 ] || exit 64 # build_arguments.py has said why
options+=(--build-arg "LOCK=${LOCK:-core}" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}")
options+=(--build-arg "REVISION=$(git -C "$here" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)")

secret() {
    [ -z "$2" ] || options+=(--secret "id=$1,src=$(realpath -e "$2")")
}
secret ca "${CA:-${SSL_CERT_FILE:-}}"
secret pipconf "${PIPCONF:-}"
secret uvtoml "${UVTOML:-}"
if [ "$engine" = podman ]; then
    # Docker's format keeps HEALTHCHECK and SHELL; the timestamp makes two builds give the same layers (Docker: SOURCE_DATE_EPOCH).
    options+=(--format docker --layers --timestamp 315532800)
fi
exec "$here/engine.sh" build --target "$target" "${options[@]}" -f "$here/Dockerfile" -t "$name" "$@" "$here/.."
