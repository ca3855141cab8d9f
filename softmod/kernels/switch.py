"""The switch for fused operations: networks use them only inside the context `used`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

NORM = 1  # the version with layer normalization only
UPDATE = 2  # the version that also fuses losses, mixing, optimizers and more
VERSIONS = (UPDATE, NORM)  # newest first

_version: ContextVar[int] = ContextVar("version of the fused operations", default=0)
_traced: ContextVar[bool] = ContextVar("code is traced to be compiled", default=False)


@contextmanager
def used(version: int = UPDATE) -> Iterator[None]:
    """Let networks use a version's fused operations in this context, such as an update; 0: none.

    Acting and evaluation run outside of it, so their results do not depend on these operations.
    """
    torch.get_num_threads()  # in a new Python thread, this sets OpenMP's number of threads
    token = _version.set(version)
    try:
        yield
    finally:
        _version.reset(token)


def version_in_use() -> int:
    """Return the version in use: 0 if none, or if the code is being compiled by PyTorch."""
    return 0 if compiling() else _version.get()


def compiling() -> bool:
    """Return whether the code is being compiled by PyTorch, or traced for that."""
    return torch.compiler.is_compiling() or _traced.get()


@contextmanager
def traced() -> Iterator[None]:
    """Trace code in this context in order to compile it."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)
