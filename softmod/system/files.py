"""Files that others may read or write at the same time, and that have to survive a crash."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)

# What network and FUSE file systems answer to a flush that they do not support.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EROFS}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what lies there at the end becomes the file, on the disk.

    Others see the file as it was before or whole, never a part of it. After an exception it is as
    it was before. The folder is made if it is missing.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make a file, or a folder's list of files, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system cannot flush {kind(path)} to the disk ({error.strerror}): a"
                  " power failure may lose the latest files")  # fmt: skip
    finally:
        os.close(descriptor)


def kind(path: Path) -> str:
    return "folders" if path.is_dir() else "files"


@cache
def warn_once(line: str) -> None:
    logger.warning("%s", line)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locked(fd: int, patience: float = math.inf, shared: bool = False) -> bool:
    """Lock an open file, waiting as long as patience (in seconds) allows; whether it is locked.

    A file system without locks counts as locked.
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
            warn_once(f"this file system has no locks ({error.strerror})")
            return True
