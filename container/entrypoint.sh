#!/usr/bin/env bash
# ddetr-entrypoint jupyter            JupyterLab on port 8888 (the image's default)
# ddetr-entrypoint ssh                an SSH server on port 2222, keys only
# ddetr-entrypoint COMMAND [ARG ...]  anything else, in its place
#
# Runs as whoever the container was started as, on a read-only root too. Exit codes: 64 the container was started wrongly (the message says
# how to do it), 78 Jupyter's token or password is (jupyter_server_config.py); else the command's own.
set -euo pipefail

wrong() {
    echo "$1: not started: $2" >&2
    exit 64
}

# A home that can be written to: an arbitrary uid (--user 12345:0) and a read-only root have none.
if [ ! -w "${HOME:-/}" ] || [ "${HOME:-/}" = / ]; then
    HOME=/tmp/home-$(id -u)
    (umask 077 && mkdir -p "$HOME") 2>/dev/null ||
        echo "ddetr-entrypoint: no folder to write to: with --read-only give --tmpfs /tmp:exec" >&2
    export HOME
fi
# A uid without a name: Python's getpass, which PyTorch's compiler asks, reads these.
if ! id -un >/dev/null 2>&1; then
    export USER=${USER:-dev} LOGNAME=${LOGNAME:-dev}
fi

# Kubernetes gives a pod variables for its services: one that is called jupyter makes JUPYTER_PORT=tcp://10.0.0.1:8888.
for port in JUPYTER_PORT SSH_PORT; do
    [[ ${!port:-0} =~ ^[0-9]+$ ]] || unset "$port"
done

warn_of_writable_data() {
    if [ -w /workspace/data ]; then
        echo "warning: /workspace/data can be written to: mount it read-only (-v ./data:/workspace/data:ro), so that nothing here can change it" >&2
    fi
}

# What a volume that came empty lacks: the notebooks.
bring_notebooks() {
    local folder=/workspace/notebooks
    if [ -w "$folder" ] && [ -z "$(ls -A "$folder")" ]; then
        cp /opt/ddetr/notebooks/*.ipynb "$folder"/ 2>/dev/null || true
    fi
}

# The first lines of the log. What it finds does not keep the container from starting.
examine() {
    timeout 120 ddetr doctor --brief >&2 </dev/null || true
}

start_jupyter() {
    command -v jupyter-lab >/dev/null || wrong jupyter "this is the image for clusters (target train); pytorch-cuda's target workspace has Jupyter"
    examine
    warn_of_writable_data
    bring_notebooks
    exec jupyter-lab
}

# Authorized keys, from the first of: AUTHORIZED_KEYS (the keys themselves), AUTHORIZED_KEYS_FILE (a path), ~/.ssh/authorized_keys.
authorized_keys() {
    if [ -n "${AUTHORIZED_KEYS:-}" ]; then
        printf '%s\n' "$AUTHORIZED_KEYS"
    elif [ -n "${AUTHORIZED_KEYS_FILE:-}" ]; then
        [ -r "$AUTHORIZED_KEYS_FILE" ] || wrong ssh "AUTHORIZED_KEYS_FILE=$AUTHORIZED_KEYS_FILE is not a file that uid $(id -u) can read"
        cat "$AUTHORIZED_KEYS_FILE"
    elif [ -r "$HOME/.ssh/authorized_keys" ]; then
        cat "$HOME/.ssh/authorized_keys"
    fi
}

# An SSH session does not inherit the container's environment: prints a line of sshd_config that gives it the variables that it needs,
# SetEnv "NAME=value" ... In double quotes sshd takes every byte for itself but \ and ", which a backslash protects. It cannot hold a line
# break, and a configuration of 256 KiB keeps sshd from answering. What cannot be passed on is named, and its value is not.
session_environment() {
    local -x LC_ALL=C
    local pair name line=SetEnv
    local wanted='^(PATH|LD_LIBRARY_PATH|LANG|PYTHONUNBUFFERED|(CUDA|NVIDIA|NCCL|TORCH|PYTORCH|OMP|DDETR)_.*)$'
    while IFS= read -r -d '' pair; do
        name=${pair%%=*}
        [[ $name =~ $wanted ]] || continue
        if [[ $pair == *$'\n'* ]]; then
            printf 'warning: SSH sessions do not have %q: its value has a line break, which sshd cannot pass on\n' "$name" >&2
        elif ((${#line} + ${#pair} > 128 * 1024)); then
            printf 'warning: SSH sessions do not have %q: this environment is too large for sshd\n' "$name" >&2
        else
            line+=" \"$pair\""
        fi
    done < <(env -0 | sort -z | sed -z 's/[\\"]/\\&/g')
    printf '%s\n' "$line"
}

start_ssh() {
    command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] ||
        wrong ssh "this is the image for clusters (target train); pytorch-cuda's target workspace has an SSH server"
    local user home keys folder
    user=$(id -un 2>/dev/null) || wrong ssh "uid $(id -u) has no name in this container, and sshd needs one: leave out --user"
    [ "$(id -u)" != 0 ] || wrong ssh "it does not run as root: leave out --user"
    home=$(getent passwd "$user" | cut -d: -f6)
    [ -n "$home" ] && [ -w "$home" ] || wrong ssh "$home cannot be written to, and the host's key is kept there: mount a volume (-v home:$home)"
    folder=$home/.sshd
    mkdir -p "$folder"
    chmod 700 "$folder"
    keys=$(HOME=$home authorized_keys)
    [ -n "$keys" ] || wrong ssh "no keys: give AUTHORIZED_KEYS_FILE (a path), AUTHORIZED_KEYS (-e AUTHORIZED_KEYS=\"\$(cat ~/.ssh/id_ed25519.pub)\") or mount $home/.ssh/authorized_keys"
    [[ $keys != *"PRIVATE KEY"* ]] || wrong ssh "the authorized keys hold a private key: give the public one (its name ends in .pub)"
    (umask 077 && printf '%s\n' "$keys" >"$folder/authorized_keys")
    ssh-keygen -l -f "$folder/authorized_keys" >/dev/null 2>&1 ||
        wrong ssh "the authorized keys hold no public key (a line such as ssh-ed25519 AAAA... name)"
    [ -s "$folder/ssh_host_ed25519_key" ] || ssh-keygen -q -t ed25519 -N '' -C '' -f "$folder/ssh_host_ed25519_key"
    examine
    warn_of_writable_data
    bring_notebooks
    echo "ssh: port ${SSH_PORT:-2222}, user $user, host key $(ssh-keygen -l -f "$folder/ssh_host_ed25519_key.pub" | cut -d' ' -f2)" >&2
    # The environment in a private file: every user of the machine can read a command line.
    rm -f "$folder/sshd_config"
    (umask 077 && { cat /opt/ddetr/container/sshd_config && session_environment; } >"$folder/sshd_config")
    exec /usr/sbin/sshd -D -e -f "$folder/sshd_config" -p "${SSH_PORT:-2222}" -o "HostKey=$folder/ssh_host_ed25519_key" \
        -o "AuthorizedKeysFile=$folder/authorized_keys" -o "AllowUsers=$user" -o PidFile=none
}

case "$*" in
jupyter) start_jupyter ;;
ssh) start_ssh ;;
healthcheck) exec python3 /opt/ddetr/container/healthcheck.py ;;
"") exec bash ;;
*)
    warn_of_writable_data
    exec "$@"
    ;;
esac
