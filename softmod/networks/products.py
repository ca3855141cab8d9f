"""Matrix products of layers: in fp32, or of factors in bfloat16 with sums and results in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_copies: ContextVar[Mapping[Tensor, Tensor] | None] = ContextVar("bfloat16 weights", default=None)


@contextmanager
def in_bf16(copies: Mapping[Tensor, Tensor] | None) -> Iterator[None]:
    """Multiply factors in bfloat16 in this context, unless `copies` is None.

    Args:
        copies: copies of weights in bfloat16; weights without a copy are converted.
    """
    token = _copies.set(copies)
    try:
        yield
    finally:
        _copies.reset(token)


def copy_of(weight: Tensor) -> Tensor | None:
    """Return the copy of a weight in bfloat16; None if products are in fp32."""
    copies = _copies.get()
    if copies is None:
        return None
    return copies[weight] if weight in copies else weight.detach().to(torch.bfloat16)


def linear(
    x: Float[Tensor, "stack rows fan_in"],
    weight: Float[Tensor, "stack fan_in fan_out"],
    bias: Float[Tensor, "stack 1 fan_out"],
    copy: Float[Tensor, "stack fan_in fan_out"] | None = None,
) -> Float[Tensor, "stack rows fan_out"]:
    """Return `x weight + bias`; with a copy of the weight, the factors are in bfloat16."""
    if copy is None:
        return torch.baddbmm(bias, x, weight)
    return product(x, weight, copy) + bias


def product(
    x: Float[Tensor, "*batch rows fan_in"],
    weight: Float[Tensor, "*batch fan_in fan_out"],
    copy: Float[Tensor, "*batch fan_in fan_out"] | None,
) -> Float[Tensor, "*batch rows fan_out"]:
    """Return `x weight`; with a copy of the weight, the factors are in bfloat16."""
    if copy is None:
        return x @ weight
    out: Tensor = _Product.apply(x.flatten(0, -3), weight.flatten(0, -3), copy.flatten(0, -3))
    return out.unflatten(0, x.shape[:-2])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, copy)
        return multiply(x, copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, copy = ctx.saved_tensors
        grad = grad.to(torch.bfloat16)
        for_x = multiply(grad, copy.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        for_weight = multiply(x.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
        return for_x, for_weight, None


def multiply(
    a: Float[Tensor, "stack rows inner"], b: Float[Tensor, "stack inner columns"]
) -> Float[Tensor, "stack rows columns"]:
    """Return the product of factors in bfloat16, summed in fp32, in fp32.

    PyTorch has this product on GPUs only. On a CPU the factors are converted, with equal results.
    """
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
