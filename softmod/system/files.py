"""Atomic writes, flushes, hashes and locks for files that are shared or must survive crashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)

# errors of network and FUSE file systems that do not support fsync
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
# and of those that do not open folders, or flush none
FOLDERS_UNSUPPORTED = {
    *UNSUPPORTED, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENOTTY
}  # fmt: skip


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success, flush it to disk and rename it to `path`.

    Readers see the old file or the new one, never a partial one. After an exception the old file
    remains. A missing folder is created.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write values to a JSON file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        _accept(error, path.is_dir())
        return
    try:
        flush_open(descriptor)
    finally:
        os.close(descriptor)


def flush_open(descriptor: int) -> None:
    """Flush an open file or folder to disk, on file systems that can; others are named once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        _accept(error, stat.S_ISDIR(os.fstat(descriptor).st_mode))


def _accept(error: OSError, folder: bool) -> None:
    """Warn once of an error that means that a file or folder cannot be flushed; raise others."""
    if error.errno not in (FOLDERS_UNSUPPORTED if folder else UNSUPPORTED):
        raise error
    kind = "folders" if folder else "files"
    warn_once(f"this file system cannot flush {kind} to the disk ({error.strerror}): a power"
              " failure may lose the latest files")  # fmt: skip


NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "panfs", "wekafs",
    "glusterfs", "orangefs", "9p", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph",
)  # fmt: skip


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the type of the network file system that a path lies on; None if it is local.

    Args:
        path: need not exist.
        mounts: where Linux lists what is mounted; other systems have no such file.
    """
    try:
        lines = mounts.read_text(errors="surrogateescape", encoding="utf-8").splitlines()
    except OSError:
        return None
    kinds: dict[Path, str] = {}
    for line in lines:
        place, _, rest = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), place.split()[4])
        kinds[Path(point)] = rest.split()[0]
    resolved = path.resolve()
    kind = next((kinds[up] for up in (resolved, *resolved.parents) if up in kinds), "")
    return kind if kind in NETWORK_FILE_SYSTEMS else None


@cache
def warn_once(line: str) -> None:
    logger.warning("%s", line)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locked(fd: int, patience: float = math.inf, shared: bool = False) -> bool:
    """Lock an open file; return True if it is locked.

    On a file system without locks, logs a warning and returns True.

    Args:
        fd: descriptor of the file.
        patience: seconds to wait for the lock.
        shared: take a shared lock instead of an exclusive one.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError as error:
            reason = error.strerror
            warn_once(
                f"this file system has no locks ({reason}): simultaneous access is not detected"
            )
            return True
