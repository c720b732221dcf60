#!/usr/bin/env bash
# Runs the container engine of this machine: `container/engine.sh build ...` is `docker build ...` or `podman build ...`.
# ENGINE=docker or ENGINE=podman chooses; `container/engine.sh --name` says which it is.
set -euo pipefail

if [ -z "${ENGINE:-}" ]; then
    # A docker command without its service is of no use.
    if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        ENGINE=docker
    elif command -v podman >/dev/null; then
        ENGINE=podman
    else
        echo "container/engine.sh: neither a running Docker nor podman is here: container/prepare.sh installs podman on Debian and Ubuntu" >&2
        exit 69
    fi
fi

lacks_sys_resource() {
    local effective
    effective=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    (((16#$effective >> 24 & 1) == 0))
}

if [ "${ENGINE##*/}" = podman ] && [ -z "${CONTAINERS_CONF:-}" ] && [ "$(id -u)" = 0 ] &&
    { [ -d /sys/fs/cgroup/unified ] || lacks_sys_resource; }; then
    CONTAINERS_CONF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/containers.conf
    export CONTAINERS_CONF
fi

if [ "${1:-}" = --name ]; then
    echo "${ENGINE##*/}"
else
    exec "$ENGINE" "$@"
fi
