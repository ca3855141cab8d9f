"""Layer normalization and ReLU in one pass, forward and backward, in fp32 and bfloat16."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from softmod.kernels.library import library
from softmod.kernels.switch import in_use

EPS = 1e-5
WIDEST = 8192  # largest row length; a row is a buffer on the C stack
LETTER = {torch.float32: "f", torch.bfloat16: "b"}  # dtypes in the names of the C functions
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # tolerance for results of size 1

_operations = torch.library.Library("softmod", "FRAGMENT")
_operations.define("layer_norm(Tensor x, bool relu) -> (Tensor out, Tensor mean, Tensor rstd)")
_operations.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool relu) -> Tensor"
)


def fits(x: Tensor) -> bool:
    """Return whether fused operations are in use and `layer_norm` supports this tensor."""
    return in_use() and x.device.type == "cpu" and x.dtype in LETTER and 0 < x.shape[-1] <= WIDEST


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


# --- PyTorch operations, and calls without arguments ----------------------------------------------


def _layer_norm(x: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _bind_forward((x, relu), (out, mean, rstd))()
    return out, mean, rstd


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
    for_x = torch.empty_like(x)
    _bind_backward((grad, x, mean, rstd, relu), (for_x,))()
    return for_x


_operations.impl("layer_norm", _layer_norm, "CPU")
_operations.impl("layer_norm_backward", _layer_norm_backward, "CPU")


def _bind_forward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Callable[[], object]:
    (x, relu), (out, mean, rstd) = args, outputs
    function = _function(f"norm_{LETTER[x.dtype]}")
    rows = x[..., 0].numel()
    width = x.shape[-1]
    return partial(function, *map(_pointer, (x, out, mean, rstd)), rows, width, EPS, relu)


def _bind_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Callable[[], object]:
    (grad, x, mean, rstd, relu), (for_x,) = args, outputs
    function = _function(f"norm_backward_{LETTER[x.dtype]}")
    rows = x[..., 0].numel()
    width = x.shape[-1]
    return partial(function, *map(_pointer, (grad, x, mean, rstd, for_x)), rows, width, relu)


BINDERS = {
    torch.ops.softmod.layer_norm.default: _bind_forward,
    torch.ops.softmod.layer_norm_backward.default: _bind_backward,
}


def bound(
    function: Any, args: Sequence[Any], outputs: Sequence[Tensor]
) -> Callable[[], object] | None:
    """Return the C function of an operation, bound to its memory; None for other operations."""
    bind = BINDERS.get(function)
    return None if bind is None else bind(args, outputs)


@cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    pointers = 5 if "backward" in name else 4
    options = [ctypes.c_int32] if "backward" in name else [ctypes.c_float, ctypes.c_int32]
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * 2 + options
    function.restype = None
    return function


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()


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
    out, mean, rstd = _layer_norm(x, relu)
    for_x = _layer_norm_backward(grad, x, mean, rstd, relu)
    pairs = ((out, expected), (for_x, gradient))
    return all(
        torch.allclose(ours.float(), theirs, rtol=0, atol=CLOSE[dtype]) for ours, theirs in pairs
    )
