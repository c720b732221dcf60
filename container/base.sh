#!/usr/bin/env bash
# Makes a base image out of Debian's packages, for a machine that reaches those and no container registry:
#     container/base.sh [SUITE [NAME]]       (default: trixie localhost/debian:trixie; takes mmdebstrap, and is quickest as root)
set -euo pipefail

suite=${1:-trixie}
name=${2:-localhost/debian:$suite}
engine=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/engine.sh
folder=$(mktemp -d "${TMPDIR:-/var/tmp}/ddetr-base.XXXXXX")
trap 'rm -rf "$folder"' EXIT

# As Debian's own slim images are: no manuals, no packages kept, no fsync for each file.
# No mirror is named: mmdebstrap takes Debian's own, with its security updates.
echo 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };' >"$folder/keep-no-packages"
mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Languages "none"' \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook="copy-in $folder/keep-no-packages /etc/apt/apt.conf.d" \
    "$suite" "$folder/base.tar"
"$engine" import --change 'CMD ["bash"]' "$folder/base.tar" "$name" >/dev/null
echo "$name"
