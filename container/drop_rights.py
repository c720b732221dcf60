"""Runs while the image is built, after packages came: files that give their rights to whoever starts them lose these.

`drop_rights.py [FOLDER]` removes setuid and setgid bits and file capabilities from every file of FOLDER's file system
(default: /). Nothing in the image needs them (su, mount, passwd, ssh-agent), and a container that is started without
`no-new-privileges` would let its user become root by them.
"""

import os
import stat
import sys

CAPABILITIES = "security.capability"


def drop_rights(folder: str) -> list[str]:
    """The paths of the files that were changed."""
    changed = []
    device = os.lstat(folder).st_dev
    for parent, folders, names in os.walk(folder):
        # What is mounted (/proc, caches of the build) stays as it is. Only folders tell: files of lower layers have
        # another device.
        folders[:] = [name for name in folders if os.lstat(os.path.join(parent, name)).st_dev == device]
        for name in names:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISREG(mode):
                continue
            capable = CAPABILITIES in os.listxattr(path)
            if capable:
                os.removexattr(path, CAPABILITIES)
            if mode & (stat.S_ISUID | stat.S_ISGID):
                os.chmod(path, stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
            elif not capable:
                continue
            changed.append(path)
    return sorted(changed)


if __name__ == "__main__":
    for path in drop_rights(sys.argv[1] if len(sys.argv) > 1 else "/"):
        sys.stdout.write(f"rights dropped: {path}\n")
