"""Standard streams that may be closed, broken or full: the work of a command does not need them."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from typing import NoReturn

from softmod.errors import WorkerError

UNWRITABLE = {errno.ENOSPC, errno.EIO}  # a full disk, a terminal that is gone
STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}  # in the order of their descriptors


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code, whatever the streams and matplotlib's settings are."""
    open_missing()
    gc.set_threshold(5_000, 10, 10)  # imports leave no garbage; looking for it took half a second
    # Libraries import matplotlib. Commands draw to files, so a backend that does not exist here, or
    # folders that matplotlib cannot write to, are no concern of theirs.
    os.environ.pop("MPLBACKEND", None)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    ignore_undecodable_settings()
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        complain(f"softmod: no temporary folder can be written ({error.strerror}); set TMPDIR")
        sys.exit(WorkerError.exit_code)
    try:
        code = command()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        code = 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again at its end, and exit with 120
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # A Ctrl-C within `exec(text)`, as dataclasses call it during imports, makes Python kill itself
    # with SIGINT at its end, even if it was caught. Another `exec` clears Python's record of it.
    exec("")
    sys.exit(code)


def ignore_undecodable_settings() -> None:
    """Import matplotlib without the `matplotlibrc` of the working folder if that is not UTF-8.

    matplotlib raises otherwise. Figures do not depend on the file.
    """
    try:
        Path("matplotlibrc").read_text(encoding="utf-8")
    except OSError:
        return
    except UnicodeDecodeError:
        with chdir(os.sep):
            import matplotlib  # noqa: F401


def open_missing() -> None:
    """Open standard streams that are closed on the null device.

    Otherwise the next file that is opened would get the descriptor of stdout, and what libraries
    print would end in it. Characters that stdout cannot encode are escaped.
    """
    for number, (name, mode) in enumerate(STREAMS.items()):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # for worker processes
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")


def is_terminal(stream: object) -> bool:
    """Return whether a stream is a terminal; a caller of the library may have replaced it."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # None, an object that only writes, closed
        return False


def say(line: str) -> None:
    """Print a line on stdout, if it can be written: no output is worth a run."""
    with suppress(Exception):
        print(line, flush=True)


def complain(line: str) -> None:
    """Print a line on stderr, if it can be written."""
    with suppress(Exception):
        print(line, file=sys.stderr, flush=True)
