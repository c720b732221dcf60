"""From the facts to rows: the system, its limits, the folders for data and output."""

from ddetr.doctor.causes import Cause
from ddetr.doctor.facts import Facts, Folder
from ddetr.doctor.machine import DATA, OUTPUT
from ddetr.doctor.rows import Row, broken, ok, warning

SYSTEM, LIMITS, FOLDERS = "Machine", "Limits", "Folders"
_GIB = 2**30
_SHARED_MEMORY, _OPEN_FILES = 2 * _GIB, 4096
_FULL, _NEARLY_FULL = 1 * _GIB, 10 * _GIB


def check_system(facts: Facts) -> list[Row]:
    machine = facts.machine
    where = {
        "": "no container",
        "docker": "in a Docker container",
        "podman": "in a podman container",
        "kubernetes": "in a Kubernetes pod",
    }.get(machine.container, "in a container")
    where += ", on WSL" if machine.wsl else ""
    cores = f", {machine.cores} cores" if machine.cores else ""
    return [
        ok(SYSTEM, "system", f"{machine.system}, kernel {machine.kernel}{cores}, {where}"),
        ok(SYSTEM, "Python", f"{machine.python} ({machine.executable}), ddetr {machine.ddetr}"),
    ]


def check_limits(facts: Facts) -> list[Row]:
    limits, container = facts.limits, facts.machine.container
    rows = []
    if limits.shared_memory is not None:
        text = f"/dev/shm has {size(limits.shared_memory)}, {size(limits.shared_memory_free or 0)} free"
        if min(limits.shared_memory, limits.shared_memory_free or 0) < _SHARED_MEMORY:
            cure = {
                "": "sudo mount -o remount,size=8G /dev/shm",
                "podman": "podman run --shm-size=8g ...",
                "kubernetes": "mount an emptyDir with medium: Memory and sizeLimit: 8Gi at /dev/shm",
            }.get(container, "docker run --shm-size=8g ... (compose: shm_size: 8gb)")
            if limits.shared_memory >= _SHARED_MEMORY:
                cure = "look for files that a killed program left there: ls -l /dev/shm"
            text += (
                ": little for the processes that load images, of which training then starts fewer, or none, and is "
                "slower"
            )
            rows.append(warning(LIMITS, "shared memory", text, cure))
        else:
            rows.append(ok(LIMITS, "shared memory", text))
    files, hard = limits.open_files, limits.open_files_hard
    if files is not None and files < _OPEN_FILES:
        enough = hard is None or hard >= _OPEN_FILES
        cure = f"ulimit -n {hard or 65536}" if enough else "docker run --ulimit nofile=65536:65536 ..., or limits.conf"
        text = f"{files}: training with many loading processes may end with 'Too many open files'"
        rows.append(warning(LIMITS, "open files", text, cure))
    else:
        rows.append(ok(LIMITS, "open files", "no limit" if files is None else str(files)))
    locked = "no limit" if limits.locked_memory is None else size(limits.locked_memory)
    rows.append(ok(LIMITS, "locked memory", f"{locked} (matters only for InfiniBand between machines)"))
    return rows


def check_folders(facts: Facts) -> list[Row]:
    rows = []
    if facts.data is not None:
        rows.append(_data_row(facts.data, facts.machine.container))
    if facts.output is not None:
        rows.append(_output_row(facts.output, facts.machine.container))
    return rows


def _data_row(folder: Folder, container: str) -> Row:
    mount = f"docker run -v ./data:{DATA}:ro ..."
    if not folder.exists and folder.error is None:
        text = f"there is no folder {folder.path}"
        if not folder.asked_for:
            return warning(FOLDERS, "data", text, f"mount your images: {mount}; ddetr demo draws its own")
        return broken(FOLDERS, "data", text, f"check --data; in a container mount it: {mount}", Cause.DATA)
    if folder.exists and not folder.is_folder:
        text = f"{folder.path} is a file, expected a folder"
        return broken(FOLDERS, "data", text, "give --data the folder that holds the images and annotations", Cause.DATA)
    if folder.error or not folder.readable:
        reason = f" ({folder.error})" if folder.error else ""
        cure = f"let everybody read it on the host: chmod -R a+rX ./{folder.path.rstrip('/').rpartition('/')[2]}"
        if container:
            cure += ", or run as its owner: docker run --user $(id -u):0 ...; on SELinux mount with :z"
        text = f"{folder.path} cannot be read by this user{reason}"
        return broken(FOLDERS, "data", text, cure, Cause.DATA)
    if not folder.entries:
        return warning(
            FOLDERS, "data", f"{folder.path} is empty", f"mount your images: {mount}; ddetr demo draws its own"
        )
    text = f"{folder.path}, {folder.entries} entries, {'can be written to' if folder.writable else 'read-only'}"
    if folder.writable and container:
        text += ": a mistake in here can change or delete your data"
        return warning(FOLDERS, "data", text, f"mount it read-only: {mount}")
    return ok(FOLDERS, "data", text)


def _output_row(folder: Folder, container: str) -> Row:
    where = f"{folder.path}{'' if folder.exists else ' (not there yet)'}"
    choose = f"mount a folder: docker run -v ./output:{OUTPUT} ..., " if container else ""
    choose += "or write elsewhere: ddetr train --output FOLDER"
    if folder.exists and not folder.is_folder:
        return broken(FOLDERS, "output", f"{where} is a file, expected a folder", choose, Cause.OUTPUT)
    if folder.error or not folder.writable:
        reason = f" ({folder.error})" if folder.error else ""
        return broken(FOLDERS, "output", f"{where} cannot be written to by this user{reason}", choose, Cause.OUTPUT)
    free = folder.free or 0
    text = f"{where}, {size(free)} free"
    if free < _FULL:
        text += ": the disk is full. A checkpoint to go on from takes about 0.7 GB"
        return broken(FOLDERS, "output", text, f"make room (df -h {folder.path}), {choose}", Cause.OUTPUT)
    if free < _NEARLY_FULL:
        text += ": little. A checkpoint to go on from takes about 0.7 GB, and a run keeps several"
        return warning(FOLDERS, "output", text, f"make room (df -h {folder.path}), {choose}")
    return ok(FOLDERS, "output", text)


def size(count: int) -> str:
    """Bytes in words: "64 MiB", "7.5 GiB"."""
    if count < _GIB:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / _GIB:.1f} GiB" if count < 10 * _GIB else f"{count / _GIB:.0f} GiB"
