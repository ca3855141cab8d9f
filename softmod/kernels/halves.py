"""bfloat16 copies of weights for an update under autocast, converted together.

Products read the copies, and gradients flow to them instead of to the weights in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from softmod.kernels.binding import Call, call, fits, operation, sizes
from softmod.kernels.switch import UPDATE, version_in_use

_copies: ContextVar[dict[Tensor, Tensor] | None] = ContextVar("copies of weights", default=None)


@contextmanager
def halves(wanted: bool) -> Iterator[None]:
    """Keep copies of weights in this context if `wanted`; `halve` makes them."""
    token = _copies.set({} if wanted else None)
    try:
        yield
    finally:
        _copies.reset(token)


@torch.no_grad()
def halve(weights: Sequence[Tensor]) -> None:
    """Make the copies of weights; no-op outside of `halves`."""
    copies = _copies.get()
    if copies is None or not weights:
        return
    renew(weights, TO_HALF([weight.detach() for weight in weights]))


def has_copy(weight: Tensor) -> bool:
    """Return whether there is a copy of a weight."""
    return weight in (_copies.get() or {})


def renew(weights: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    """Use new copies of weights, without a gradient."""
    copies = _copies.get()
    if copies is None:
        return
    for weight, half in zip(weights, made, strict=True):
        copies[weight] = half.requires_grad_(weight.requires_grad)


def follow(weights: Sequence[Tensor]) -> None:
    """Let gradients flow to the copies of those weights that require a gradient."""
    copies = _copies.get() or {}
    for weight in weights:
        if weight in copies:
            copies[weight].requires_grad_(weight.requires_grad)


def gradient(weight: Tensor) -> Tensor | None:
    """Return a weight's gradient, which may be that of its copy; None if there is none."""
    half = (_copies.get() or {}).get(weight)
    return weight.grad if half is None else half.grad


def same_dtype(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...] | None:
    """Return an input and the weights to multiply, in one dtype that the kernels support.

    Return None if version 2 is not in use or does not support them.
    """
    if version_in_use() < UPDATE or not fits(x, *weights):
        return None
    copies = _copies.get() or {}
    if all(weight in copies for weight in weights):
        return x.to(torch.bfloat16), *(copies[weight] for weight in weights)
    if torch.is_autocast_enabled("cpu") or any(weight.dtype != x.dtype for weight in weights):
        return None
    return x, *weights


# --- PyTorch operation ----------------------------------------------------------------------------


def _bind_to_half(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call("to_half", UPDATE, args[0], list(outputs), sizes(args[0]), len(args[0]))


TO_HALF = operation(
    "to_half(Tensor[] weights) -> Tensor[]",
    lambda weights: [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights],
    _bind_to_half,
)
