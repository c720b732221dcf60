#!/usr/bin/env bash
# Tries the full image: container/test_image.sh NAME [PYTEST OPTION ...]
#
# ddetr's tests and a short training, in containers without any rights and with a read-only root. The tests run in the target `test`, which adds
# pytest and the like to NAME's environment; the source tree is mounted read-only, and the installed package is what is tested.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
name=$1
shift
hardened=(--rm --cap-drop=all --security-opt=no-new-privileges --read-only --tmpfs /tmp:exec --shm-size=2g)
[ "$("$here/engine.sh" --name)" != podman ] || hardened+=(--no-healthcheck)
# Processors on which OpenBLAS must be told their kind: as outside.
for variable in OPENBLAS_CORETYPE OPENBLAS_L2_SIZE; do
    [ -z "${!variable:-}" ] || hardened+=(-e "$variable")
done
# PYTHONSAFEPATH: or children that the tests start in the source tree would import it in place of the installed package.
mounts=(-v "$root:/src/ddetr:ro" -e PYTHONSAFEPATH=1)
[ ! -d "$root/../shared" ] || mounts+=(-v "$(realpath "$root/../shared"):/src/shared:ro")

echo "--- what is in it" >&2
"$here/engine.sh" run "${hardened[@]}" "$name" python -c '
import torch, torchvision, numpy, pandas, scipy, matplotlib, jupyterlab, ddetr, ddetr.ops
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "torchvision", torchvision.__version__)
assert any(b.name == "native" and b.active for b in ddetr.ops.backends()), "the compiled CPU kernel"'

echo "--- a short training, as the README has it" >&2
"$here/engine.sh" run "${hardened[@]}" "$name" bash -c 'cd /tmp && ddetr demo --output /tmp/demo'

echo "--- ddetr's tests" >&2
# Of the image's own variant, also where this is not started by make.
VARIANT=$("$here/engine.sh" image inspect --format '{{index .Config.Labels "ddetr.variant"}}' "$name")
export VARIANT
"$here/build.sh" test "$name-test" >&2
"$here/engine.sh" run "${hardened[@]}" "${mounts[@]}" -w /src/ddetr "$name-test" \
    pytest -n auto --maxprocesses 4 --dist loadfile -p no:cacheprovider --basetemp=/tmp/pytest --ignore=tests/container "$@"
