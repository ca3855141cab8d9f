"""The C library: compiled with the system's compiler, kept in the cache folder, checked before it is used."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from softmod.errors import SoftmodError
from softmod.machine import cache_folder, processor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")  # or what $CC names
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native", "")  # the first one that the compiler takes
SECONDS = 60.0  # for one compilation; it takes about one


class CompilerError(SoftmodError):
    """The library cannot be compiled here."""


@cache
def library() -> ctypes.CDLL:
    """Return the library, compiled where the cache folder does not hold it yet.

    Raises:
        CompilerError: there is no compiler, or it fails, or what it made cannot be loaded.
    """
    path = cache_folder() / f"kernels-{_key()}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        pass
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        _compile(made)
        try:
            _keep(made, path)
        except OSError as error:
            log.warning("compiled kernels cannot be kept in %s (%s): compiled again next time", path.parent, error)
        try:
            return ctypes.CDLL(str(made))
        except OSError as error:
            raise CompilerError(f"what was compiled cannot be loaded ({error})") from error


@cache
def available() -> bool:
    """Return whether the fused operations can be used here: they compile, and compute what PyTorch's do."""
    from softmod.kernels.norm import agrees

    try:
        library()
    except CompilerError as error:
        log.info("updates run without fused operations: %s", error)
        return False
    if not agrees():
        log.warning("updates run without fused operations: compiled on this machine, they compute something else")
        return False
    return True


def _key() -> str:
    """A name for what is compiled: other sources, flags or processors need another one."""
    about = [SOURCE.read_text(), *FLAGS, os.environ.get("CC", ""), platform.machine(), processor(), _features()]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _features() -> str:
    """The processor's instruction sets, where the system tells: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(target: Path) -> None:
    command = shlex.split(os.environ.get("CC", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command:
        raise CompilerError(f"no C compiler ({', '.join(COMPILERS)})")
    told = ""
    for native in FOR_THIS_PROCESSOR:
        line = [*command, *FLAGS, *([native] if native else []), "-o", str(target), str(SOURCE), "-lm"]
        try:
            done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerError(f"{command[0]} cannot be run ({error})") from error
        if done.returncode == 0:
            return
        told = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
    raise CompilerError(f"{command[0]} fails ({told})")


def _keep(made: Path, path: Path) -> None:
    """Copy beside, then rename: another process sees the whole library or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.copyfile(made, beside)
    os.replace(beside, path)
