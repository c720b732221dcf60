# shellcheck shell=bash
# Sourced while the image is built: a network's own certificate authority and package index, from build secrets. Nothing of them is kept.
if [ -s /run/secrets/ca ]; then
    export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pipconf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pipconf
fi
if [ -s /run/secrets/uvtoml ]; then
    export UV_CONFIG_FILE=/run/secrets/uvtoml
fi
