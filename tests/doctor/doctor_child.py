"""Children that a test starts: each does something that must not harm its parent."""

import os
import sys
import time
from collections.abc import Sequence

from ddetr.doctor import children


def main(arguments: Sequence[str]) -> None:
    (what,) = arguments
    if what.startswith("cuda:"):  # as a trial of a device that fails as its number says
        children.tell(begins="allocation")
        children.tell(device=what, name="allocation", passed=True, detail="256 MiB")
        children.tell(begins="operator")
        what = {"cuda:0": "crash", "cuda:1": "hang", "cuda:2": "killed"}[what]
    children.tell(before=what)
    if what == "print":
        print("noise of a library", flush=True)
        os.write(1, b"noise of C code\n")
    elif what == "raise":
        raise ValueError("first line\nsecond line")
    elif what == "crash":
        import ctypes

        ctypes.string_at(0)
    elif what == "killed":
        os.kill(os.getpid(), 9)
    elif what == "hang":
        if os.fork() == 0:  # its own child holds the pipe open as well
            time.sleep(600)
        time.sleep(600)
    elif what == "path":
        children.tell(path=sys.path)
    children.tell(after=what)
