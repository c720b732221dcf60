"""What the operating system says of NVIDIA's driver, without loading it."""

import re
from pathlib import Path


def kernel_module(root: Path = Path("/")) -> str | None:
    """Version of the driver's kernel module, such as "570.86.10"; None where there is none. `root` is where /proc
    lies."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
