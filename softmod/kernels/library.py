"""The C library: compiled with the system's compiler, kept in the cache folder, checked before it
is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from softmod.errors import SoftmodError
from softmod.system.files import atomic_write
from softmod.system.hardware import cache_folder, processor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")  # or what $CC names
FLAGS = (
    "-O3",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
FOR_THIS_PROCESSOR = (
    "-march=native",
    "-mcpu=native",
    "",
)  # the first one that the compiler accepts
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SECONDS = 60.0  # for one compilation; it takes about one


class CompilerError(SoftmodError):
    """The library cannot be compiled here."""


@cache
def library() -> ctypes.CDLL:
    """Return the library, compiled where the cache folder does not hold it yet.

    Raises:
        CompilerError: there is no compiler, or it fails, or what it made cannot be loaded.
    """
    try:
        path = cache_folder().resolve() / f"kernels-{key()}.so"
        return _kept(path) or _new(path)
    except (OSError, ValueError) as error:  # no folder for temporary files, an open quote in $CC
        raise CompilerError(str(error)) from error


@cache
def available() -> bool:
    """Return whether the fused operations can be used here: they compile, and their results are
    PyTorch's.
    """
    from softmod.kernels.norm import agrees

    try:
        library()
    except CompilerError as error:
        log.info("updates run without fused operations: %s", error)
        return False
    if not agrees():
        log.warning(
            "updates run without fused operations: those compiled on this machine give other"
            " results"
        )
        return False
    return True


def key() -> str:
    """Return a name for what is compiled: other sources, flags, compilers or processors have
    another one.
    """
    about = [
        SOURCE.read_text(),
        *FLAGS,
        os.environ.get("CC", ""),
        platform.machine(),
        processor(),
        _features(),
    ]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _features() -> str:
    """Return the processor's instruction sets, else the machine's name: a home folder may be shared
    by machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def _kept(path: Path) -> ctypes.CDLL | None:
    """Load the library from the cache folder; None if it is missing, damaged, or others could have
    written it.
    """
    try:
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & OTHERS_WRITE:
            log.warning("%s is not used: others than its user could have written it", path)
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _new(path: Path) -> ctypes.CDLL:
    """Compile the library, keep it in the cache folder where that is possible, and load it."""
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        _compile(made)
        candidates = [made]
        try:
            _keep(made, path)
            candidates.insert(0, path)
        except OSError as error:
            log.warning(
                "compiled kernels cannot be kept in %s (%s): compiled again next time",
                path.parent,
                error,
            )
        told = ""
        for candidate in candidates:  # either folder may be one that nothing is executed from
            try:
                return ctypes.CDLL(str(candidate))
            except OSError as error:
                told = str(error)
        raise CompilerError(f"what was compiled cannot be loaded ({told})")


def _compile(target: Path) -> None:
    command = (
        shlex.split(os.environ.get("CC", ""))
        or [name for name in COMPILERS if shutil.which(name)][:1]
    )
    if not command:
        raise CompilerError(f"no C compiler ({', '.join(COMPILERS)})")
    told = ""
    for native in FOR_THIS_PROCESSOR:
        line = [
            *command,
            *FLAGS,
            *([native] if native else []),
            "-o",
            str(target),
            str(SOURCE),
            "-lm",
        ]
        try:
            done = subprocess.run(
                line, check=False, capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerError(f"{command[0]} cannot be run ({error})") from error
        if done.returncode == 0:
            return
        told = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
    raise CompilerError(f"{command[0]} fails ({told})")


def _keep(made: Path, path: Path) -> None:
    with atomic_write(path) as beside:
        beside.touch(0o600)  # for its user alone
        beside.write_bytes(made.read_bytes())
