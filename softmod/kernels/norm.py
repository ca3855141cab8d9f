"""Layer normalization and ReLU in one pass, forward and backward, in fp32 and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from softmod.kernels.binding import LETTER, WIDEST, Call, call, operation
from softmod.kernels.switch import NORM, version_in_use

EPS = 1e-5
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # tolerance for results of size 1


def fits(x: Tensor) -> bool:
    """Return whether fused operations are in use and `layer_norm` supports this tensor."""
    return (
        version_in_use() > 0
        and x.device.type == "cpu"
        and x.dtype in LETTER
        and 0 < x.shape[-1] <= WIDEST
    )


def layer_norm(x: Float[Tensor, "*rows width"], relu: bool) -> Float[Tensor, "*rows width"]:
    """Normalize the last axis to mean 0 and variance 1, then apply ReLU if `relu`.

    The result has the dtype of `x`.
    """
    x = x.contiguous()
    if not torch.is_grad_enabled():
        return _forward(x, relu)[0]
    out: Tensor = _LayerNorm.apply(x, relu)
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: bool) -> Tensor:
        out, mean, rstd = _forward(x, relu)
        ctx.relu = relu
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, rstd = ctx.saved_tensors
        for_x: Tensor = torch.ops.softmod.layer_norm_backward(
            grad.contiguous(), x, mean, rstd, ctx.relu
        )
        return for_x, None


def _forward(x: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.softmod.layer_norm(x, relu)
    return outputs


# --- PyTorch operations ---------------------------------------------------------------------------


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _bind_forward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x, relu = args
    name = f"norm_{LETTER[x.dtype]}"
    rows, width = x[..., 0].numel(), x.shape[-1]
    return call(name, NORM, x, *outputs, rows, width, EPS, relu)


def _bind_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    grad, x, mean, rstd, relu = args
    name = f"norm_backward_{LETTER[x.dtype]}"
    rows, width = x[..., 0].numel(), x.shape[-1]
    return call(name, NORM, grad, x, mean, rstd, *outputs, rows, width, relu)


operation(
    "layer_norm(Tensor x, bool relu) -> (Tensor out, Tensor mean, Tensor rstd)",
    lambda x, relu: (torch.empty_like(x), _statistics(x), _statistics(x)),
    _bind_forward,
)
operation(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool relu) -> Tensor",
    lambda grad, x, mean, rstd, relu: (torch.empty_like(x),),
    _bind_backward,
)


def agrees() -> bool:
    """Return whether all compiled functions agree with PyTorch on an example."""
    return all(_agrees(dtype, relu) for dtype in LETTER for relu in (False, True))


def _agrees(dtype: torch.dtype, relu: bool) -> bool:
    x = torch.linspace(-2.0, 3.0, 4 * 40).mul(7.0).sin().view(4, 40).to(dtype)
    grad = torch.linspace(1.0, 2.0, 4 * 40).mul(9.0).cos().view(4, 40).to(dtype)
    leaf = x.float().requires_grad_()
    expected = functional.layer_norm(leaf, leaf.shape[-1:], eps=EPS)
    expected = expected.relu() if relu else expected
    (gradient,) = torch.autograd.grad(expected, leaf, grad.float())
    out, mean, rstd = _forward(x, relu)
    for_x = torch.ops.softmod.layer_norm_backward(grad, x, mean, rstd, relu)
    pairs = ((out, expected), (for_x, gradient))
    return all(
        torch.allclose(ours.float(), theirs, rtol=0, atol=CLOSE[dtype]) for ours, theirs in pairs
    )
