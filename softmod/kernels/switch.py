"""The switch for fused operations: networks use them only inside the context `used`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_wanted: ContextVar[bool] = ContextVar("fused operations", default=False)


@contextmanager
def used(wanted: bool = True) -> Iterator[None]:
    """Let networks use the fused operations in this context, such as an update.

    Acting and evaluation run outside of it, so their results do not depend on these operations.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def in_use() -> bool:
    """Return whether fused operations are on, and the code is not being compiled by PyTorch."""
    return not torch.compiler.is_compiling() and _wanted.get()
