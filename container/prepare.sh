#!/usr/bin/env bash
# Installs what builds and tries the image where nothing is there yet: podman, runc, mmdebstrap, an ssh client. For continuous integration and
# for a fresh machine; Docker, where it runs, is enough to build.
set -euo pipefail

if docker info >/dev/null 2>&1 && command -v ssh >/dev/null; then
    exit 0
fi
commands=(podman runc mmdebstrap ssh)
packages=(podman runc mmdebstrap openssh-client netavark aardvark-dns iptables)
missing=()
for command in "${commands[@]}"; do
    command -v "$command" >/dev/null || missing+=("$command")
done
[ "${#missing[@]}" = 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "container/prepare.sh: missing: ${missing[*]}. It installs them as root on Debian and Ubuntu; elsewhere install podman, runc," \
        "mmdebstrap and OpenSSH's client by hand" >&2
    exit 69
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
    apt-get update >/dev/null
    apt-get install -y --no-install-recommends "${packages[@]}" >/dev/null
}
