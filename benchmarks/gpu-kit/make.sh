#!/usr/bin/env bash
# Puts dist/gpu-kit together: all that `ddetr bench gpu` needs on a machine with a GPU, Python 3.12 on x86-64 and no
# network, but for PyTorch, Triton, torchvision, SciPy, timm, Lightning and transformers.
#
#   make gpu-kit [DATA=FOLDER] [OFFICIAL=FOLDER]
#
#   DATA        data set of the real training (default: ../shared/data/bccd where it is; none: drawn shapes)
#   OFFICIAL    models/ops of the official repository, which is built there to be measured
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
bin=${BIN:-.venv/bin}
kit=dist/gpu-kit
most_mib=40
data=${DATA:-}
[ -n "$data" ] || [ ! -d ../shared/data/bccd ] || data=../shared/data/bccd

rm -rf "$kit"
mkdir -p "$kit/wheels"
platforms=()
for number in 28 27 17; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
"$bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --platform any \
    -d "$kit/wheels" -r requirements/gpu-kit.lock
DDETR_WHEEL_PLATFORM=linux-x86_64 "$bin/hatchling" build -t wheel -d "$kit/wheels" >/dev/null
git ls-files -z -- tests configs pyproject.toml | xargs -0 cp --parents -t "$kit"
cp benchmarks/gpu-kit/run.sh "$kit"
[ -z "$data" ] || cp -rL "$data" "$kit/data"
if [ -n "${OFFICIAL:-}" ]; then
    mkdir "$kit/official"
    cp -r "$OFFICIAL/src" "$kit/official"
fi
git describe --always --dirty --abbrev=40 --exclude '*' >"$kit/commit" 2>/dev/null || echo unknown >"$kit/commit"

mib=$(du -sm --apparent-size "$kit" | cut -f1)
if [ "$mib" -gt "$most_mib" ]; then
    echo "make gpu-kit: $kit has $mib MiB, more than the $most_mib that it may have: leave DATA out or take less of it" >&2
    exit 1
fi
echo "$kit: $mib MiB. On the machine with the GPU: $kit/run.sh FOLDER"
