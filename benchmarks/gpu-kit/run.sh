#!/usr/bin/env bash
# On the machine with the GPU: run.sh FOLDER [OPTION of ddetr bench gpu ...]. Nothing is installed there: what is missing is unpacked into a
# folder of its own, from the wheels beside this file. PYTHON names another python than python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if [ $# = 0 ]; then
    echo "usage: $0 FOLDER [OPTION of ddetr bench gpu ...]" >&2
    exit 64
fi
output=$(realpath -m "$1")
shift
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" - "$here/wheels" "$site" <<'PROGRAM'
import importlib.metadata, importlib.util, pathlib, sys, zipfile

if sys.version_info[:2] != (3, 12):
    print(f"run.sh: this is Python {sys.version.split()[0]}: of the wheels only those without compiled parts fit", file=sys.stderr)
for name in ("torch", "triton", "torchvision", "scipy", "timm", "lightning", "transformers"):
    if importlib.util.find_spec(name) is None:
        print(f"run.sh: {name} is not installed, and not part of this kit", file=sys.stderr)
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    name, _, python = wheel.name.split("-")[0:3]
    try:
        there = name != "ddetr" and bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        there = False
    fits = python.startswith("py") or f"cp{sys.version_info[0]}{sys.version_info[1]}" == python or "abi3" in wheel.name
    if not there and fits:
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
PROGRAM
options=()
[ ! -d "$here/data" ] || options+=(--data "$here/data")
[ ! -d "$here/official" ] || options+=(--official "$here/official")
cd "$here" # where the tests are
DDETR_COMMIT=$(cat "$here/commit")
export DDETR_COMMIT PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
"$python" -m ddetr bench gpu --output "$output" "${options[@]}" "$@"
