"""The user that a process runs as: containers often give it neither a name nor a home folder."""

from __future__ import annotations

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path


def ensure_identity() -> None:
    """Give a user without a name or a home folder these, in this process and those below it.

    MLflow and PyTorch ask for them, and fail where there are none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # of Python 3.11 and 3.13
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    os.environ.setdefault("HOME", str(home()))


def home() -> Path:
    """Return the user's home folder; where there is none, a private one in the temporary folder."""
    found = os.path.expanduser("~")
    if os.path.isabs(found):
        return Path(found)
    return private_folder(Path(tempfile.gettempdir(), f"softmod-home-{os.getuid()}"))


def cache_folder() -> Path:
    """Return the folder for caches: `$SOFTMOD_CACHE`, else softmod's in the user's cache folder."""
    if own := os.environ.get("SOFTMOD_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache", "softmod")


def private_folder(path: Path) -> Path:
    """Return a folder that only this user can write: this one, or, where somebody else made it, a
    new one.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="softmod-home-"))
    return path
