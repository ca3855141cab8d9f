"""The C library of fused operations: compiled locally, cached, and checked before use."""

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
from softmod.kernels.switch import NORM, UPDATE, VERSIONS
from softmod.system.files import atomic_write
from softmod.system.hardware import processor
from softmod.system.user import cache_folder

log = logging.getLogger(__name__)

SOURCES = {
    NORM: Path(__file__).with_name("kernels.c"),
    UPDATE: Path(__file__).with_name("update.c"),
}
COMPILERS = ("cc", "gcc", "clang")  # if $CC is not set
FLAGS = (
    "-O3",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
# With the first flag, loops are shared among threads. Libraries without it have names of their own.
THREADS = {"-fopenmp": "", "": "-one-thread"}
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native", "")  # the first accepted flag is used
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SECONDS = 60.0  # time limit of a compilation, which takes a few seconds


class CompilerError(SoftmodError):
    """A library that cannot be compiled or loaded on this machine."""


@cache
def library(version: int) -> ctypes.CDLL:
    """Load a version's library; compile it first if it is not in the cache folder.

    Raises:
        CompilerError: there is no compiler, it fails, or its output cannot be loaded.
    """
    return build("kernels", SOURCES[version].read_text(encoding="utf-8"))


def build(name: str, source: str) -> ctypes.CDLL:
    """Load the library of a C source; compile it first if it is not in the cache folder.

    Its loops are shared among PyTorch's threads if the compiler calls functions for this that
    PyTorch's OpenMP library has. GCC does where PyTorch uses GCC's library or Intel's.

    Raises:
        CompilerError: there is no compiler, it fails, or its output cannot be loaded.
    """
    try:
        path = cache_folder().resolve() / f"{name}-{_hash(source)}"
        paths = {flag: path.with_name(f"{path.name}{end}.so") for flag, end in THREADS.items()}
        for kept in paths.values():
            if found := _load_cached(kept):
                return found
        return _compile_and_load(paths, source)
    except (OSError, ValueError) as error:  # such as no temporary folder, an open quote in $CC
        raise CompilerError(str(error)) from error


@cache
def available(version: int = UPDATE) -> bool:
    """Return whether a version's operations compile here and agree with PyTorch."""
    from softmod.kernels import norm, trial

    try:
        library(version)
    except CompilerError as error:
        log.info("updates run without fused operations: %s", error)
        return False
    if not (norm.agrees() if version == NORM else trial.agrees()):
        log.warning(
            "updates run without fused operations of version %s: on this machine, their results"
            " differ from PyTorch's",
            version,
        )
        return False
    return True


def newest() -> int:
    """Return the newest version that is available; 0 if none is."""
    return next((version for version in VERSIONS if available(version)), 0)


def key(version: int = UPDATE) -> str:
    """Return a hash of what determines a version's library."""
    return _hash(SOURCES[version].read_text(encoding="utf-8"))


def _hash(source: str) -> str:
    """Return a hash of what determines a library: source, flags, compiler and processor."""
    parts = [
        source,
        *FLAGS,
        os.environ.get("CC", ""),
        platform.machine(),
        processor(),
        _features(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _features() -> str:
    """Return the processor's instruction sets, or the machine's name if they are unknown.

    Different machines may share a home folder and thus the cache.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def _load_cached(path: Path) -> ctypes.CDLL | None:
    """Load the library from the cache folder.

    Return None if it is missing or damaged, or if other users could have written it.
    """
    try:
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & OTHERS_WRITE:
            log.warning("%s is not used: other users could have written it", path)
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compile_and_load(paths: dict[str, Path], source: str) -> ctypes.CDLL:
    """Compile the library with the first flag of `THREADS` with which it can be loaded.

    Store it in the cache folder if possible.
    """
    for threads, path in paths.items():
        with TemporaryDirectory() as folder:
            compiled = Path(folder) / path.name
            text = compiled.with_suffix(".c")
            text.write_text(source, encoding="utf-8")
            try:
                _compile(compiled, text, threads)
                return _store_and_load(compiled, path)
            except CompilerError as error:
                if not threads or error.__cause__:  # such as a compiler that cannot be run
                    raise
                log.info("fused operations use one thread: %s", error)
    raise AssertionError


def _compile(target: Path, source: Path, threads: str) -> None:
    """Compile a library with the first processor flag that the compiler accepts.

    It is not linked with an OpenMP library of the compiler's choice: it finds the functions of the
    one that PyTorch has loaded, and with them PyTorch's threads.
    """
    compiler = _compiler()
    object_file = source.with_suffix(".o")
    reason = ""
    for native in FOR_THIS_PROCESSOR:
        options = [flag for flag in (*FLAGS, native, threads) if flag]
        reason = failure([*compiler, *options, "-c", "-o", str(object_file), str(source)])
        if not reason:
            reason = failure([*compiler, "-shared", "-o", str(target), str(object_file), "-lm"])
        if not reason:
            return
    raise CompilerError(f"{compiler[0]} fails ({reason})")


def failure(command: list[str]) -> str:
    """Run a compiler; return why it fails, or an empty string.

    Raises:
        CompilerError: it cannot be run.
    """
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerError(f"{command[0]} cannot be run ({error})") from error
    if done.returncode == 0:
        return ""
    return (done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]


def _store_and_load(compiled: Path, path: Path) -> ctypes.CDLL:
    candidates = [compiled]
    try:
        _store(compiled, path)
        candidates.insert(0, path)
    except OSError as error:
        log.warning(
            "compiled kernels cannot be kept in %s (%s); they will be compiled again next time",
            path.parent,
            error,
        )
    reason = ""
    for candidate in candidates:  # either folder may be mounted without execute permission
        try:
            return ctypes.CDLL(str(candidate))
        except OSError as error:
            reason = str(error)
    raise CompilerError(f"the compiled library cannot be loaded ({reason})")


def _compiler() -> list[str]:
    """Return the compiler command: $CC, or the first of `COMPILERS` on the path."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise CompilerError(f"no C compiler ({', '.join(COMPILERS)})")


def _store(compiled: Path, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.touch(0o600)  # for this user only
        temporary.write_bytes(compiled.read_bytes())
