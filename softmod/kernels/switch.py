"""Whether networks use the fused operations: only inside a block that says so, such as
an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_wanted: ContextVar[bool] = ContextVar("fused operations", default=False)


@contextmanager
def used(wanted: bool = True) -> Iterator[None]:
    """Let networks use the fused operations in this block; acting and evaluation, outside, do not
    depend on them.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def in_use() -> bool:
    """Return whether the code is in such a block, and not being compiled by PyTorch, which fuses by
    itself.
    """
    return not torch.compiler.is_compiling() and _wanted.get()
