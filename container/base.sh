#!/usr/bin/env bash
# Makes a base image with debootstrap, for a machine that reaches Debian's packages and no container registry:
#     container/base.sh [SUITE [NAME]]       (as root; default: trixie localhost/debian:trixie)
# Then: make image BASE_IMAGE=localhost/debian:trixie
set -euo pipefail

suite=${1:-trixie}
name=${2:-localhost/debian:$suite}
engine=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/engine.sh
root=$(mktemp -d "${TMPDIR:-/var/tmp}/ddetr-base.XXXXXX")
trap 'rm -rf "$root"' EXIT

# No mirror is named: debootstrap writes its own choice into sources.list.
debootstrap --variant=minbase --merged-usr "$suite" "$root" >"$root.log" 2>&1 || { tail -n 30 "$root.log" >&2; exit 1; }
rm -f "$root.log"
main=$(cat "$root/etc/apt/sources.list")
{
    echo "$main"
    echo "$main" | sed -E "s|/debian/? $suite |/debian $suite-updates |"
    echo "$main" | sed -E "s|/debian/? $suite |/debian-security $suite-security |"
} >"$root/etc/apt/sources.list"
mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
printf 'path-exclude %s\n' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/doc/*' '/usr/share/locale/*' >"$root/etc/dpkg/dpkg.cfg.d/slim"
echo 'path-include /usr/share/doc/*/copyright' >>"$root/etc/dpkg/dpkg.cfg.d/slim"
# As in Debian's own slim images: no service starts while packages are installed.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
find "$root/usr/share/doc" -mindepth 2 ! -name copyright ! -type d -delete
rm -rf "$root"/usr/share/{man,info,locale}/* "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin \
    "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root/etc/machine-id" "$root/etc/resolv.conf" "$root/etc/hostname"
tar -C "$root" --one-file-system --numeric-owner --sort=name -c . |
    "$engine" import --change 'CMD ["bash"]' - "$name" >/dev/null
echo "$name"
