#!/usr/bin/env bash
# A software bill of materials of a built image, CycloneDX 1.6 in JSON on standard output: container/sbom.sh NAME
# Python's packages by cyclonedx-bom from their metadata, Debian's from dpkg. Nothing is installed into the image.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
hardened=(--rm --cap-drop=all --read-only --network=none --entrypoint=bash)
[ "$("$here/engine.sh" --name)" != podman ] || hardened+=(--no-healthcheck)

# An environment of metadata alone: what lies in the image's, without its 5 GB of libraries.
"${PYTHON:-python3}" -m venv --without-pip "$folder/env"
packages=$(echo "$folder"/env/lib/python3.*/site-packages)
# shellcheck disable=SC2016 # expanded in the container
"$here/engine.sh" run "${hardened[@]}" "$1" -c 'cd /opt/venv/lib/python3.*/site-packages && tar -c -- *.dist-info' | tar -x -C "$packages"
# shellcheck disable=SC2016 # dpkg-query's own
"$here/engine.sh" run "${hardened[@]}" "$1" -c 'dpkg-query -W -f "\${Package}\t\${Version}\t\${Architecture}\n"' >"$folder/debian"
read -ra cyclonedx <<<"${CYCLONEDX:-cyclonedx-py}"
"${cyclonedx[@]}" environment --of JSON --sv 1.6 --output-reproducible -o "$folder/sbom.json" "$folder/env"
"${PYTHON:-python3}" - "$folder/sbom.json" "$folder/debian" <<'P'
import json, sys
from urllib.parse import quote

bill = json.load(open(sys.argv[1], encoding="utf-8"))
for line in open(sys.argv[2], encoding="utf-8"):
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}"
    bill["components"].append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
json.dump(bill, sys.stdout, indent=1)
P
