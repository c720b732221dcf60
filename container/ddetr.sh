#!/usr/bin/env bash
# Runs while the image is built: ddetr.sh wheel  makes ddetr's wheel from /src; ddetr.sh install  puts it into /opt/venv and its files in place.
set -euo pipefail
# shellcheck source=container/tools.sh
source /opt/ddetr/container/tools.sh

case $1 in
wheel)
    # The compiled kernel lies there already, as a file of the package.
    cd /src
    compgen -G 'ddetr/ops/native/lib/*.so' >/dev/null
    DDETR_NATIVE=0 PATH=$tools/bin:$PATH hatchling build -t wheel -d /files/opt/ddetr/wheel
    ;;
install)
    # By pip: uv notes the time at which a local wheel was made, and no two builds would give the same layer.
    "$tools/bin/pip" --python /opt/venv/bin/python install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-cache-dir --no-compile --no-deps --no-index --find-links /opt/ddetr/wheel ddetr
    compile_new
    chmod 755 /usr/local/bin/ddetr-entrypoint
    ln -sfn /opt/ddetr/configs /workspace/configs
    # At hand and the user's own; a volume mounted there gets them from the engine or, where it does not, from the entrypoint.
    install -d -o 1000 -g 0 -m 2775 /workspace/notebooks
    find /opt/ddetr/notebooks -maxdepth 1 -name '*.ipynb' -exec install -o 1000 -g 0 -m 664 -t /workspace/notebooks {} +
    ;;
*)
    echo "ddetr.sh: wheel or install, not $1" >&2
    exit 64
    ;;
esac
