"""Which validations are this user's own: their list of images is signed with a key that lies not in the run folder.

A run folder may come from anybody, and names images by their paths; a report shows pictures, and is passed on. A folder
from elsewhere cannot have the signature, so it gets no picture of this machine into its report. The key is
`ddetr/run-key` in the user's cache folder (XDG_CACHE_HOME or ~/.cache, on Windows LOCALAPPDATA); where none can be
kept, it lasts as long as the process.
"""

import functools
import hashlib
import hmac
import logging
import os
import secrets
import tempfile

from ddetr.ops.verified import cache_folder
from ddetr.untrusted import read_bytes

KEY_FILE = "run-key"
_KEY_BYTES = 32
_log = logging.getLogger(__name__)


def signed(paths: bytes) -> str:
    """The signature of a validation's list of images."""
    return hmac.new(_key(), b"ddetr validation\0" + paths, hashlib.sha256).hexdigest()


def is_signed(paths: bytes, signature: object) -> bool:
    """Whether this user signed the list, on a machine with this cache folder."""
    return isinstance(signature, str) and hmac.compare_digest(
        signature.encode("utf-8", "replace"), signed(paths).encode()
    )


@functools.cache
def _key() -> bytes:
    try:
        file = cache_folder() / KEY_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(dir=file.parent, prefix=KEY_FILE)  # nobody else may read it
            with os.fdopen(descriptor, "wb") as new:
                new.write(secrets.token_bytes(_KEY_BYTES))
            os.replace(fresh, file)
        key = read_bytes(file, _KEY_BYTES)
        if len(key) == _KEY_BYTES:
            return key
        _log.debug("%s is no key of %d bytes", file, _KEY_BYTES)
    except (OSError, RuntimeError) as error:
        _log.debug("no key is kept: %s", error)
    return secrets.token_bytes(_KEY_BYTES)
