"""Layers whose bias, normalization, ReLU and residual sum share passes over the activations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from softmod.kernels.binding import LETTER, Call, call, operation
from softmod.kernels.norm import EPS
from softmod.kernels.switch import UPDATE

LEAST_NORM = 1e-12  # a smaller norm of a row counts as this, as in PyTorch


def linear(
    inputs: Sequence[Tensor], norm: bool = False, relu: bool = False
) -> Float[Tensor, "stack rows fan_out"]:
    """Return `x weight + bias`, normalized if `norm`, with ReLU if `relu`.

    Args:
        inputs: x `[stack, rows, in]`, weight `[stack, in, out]` and bias `[stack, 1, out]`, all of
            the same dtype.
        norm: whether rows are normalized.
        relu: whether ReLU is applied.
    """
    out: Tensor = _Linear.apply(*inputs, norm, relu)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: bool, relu: bool
    ) -> Tensor:
        product = torch.baddbmm(bias, x, weight)
        ctx.norm, ctx.relu = norm, relu
        if norm:
            out, mean, rstd = NORM(product, None, None, product.shape[1], relu)
            ctx.save_for_backward(x, weight, product, mean, rstd)
        else:
            out = RELU(product) if relu else product
            ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        x, weight, out, *statistics = ctx.saved_tensors
        if ctx.norm:
            grad, sums = NORM_BACKWARD(grad, out, None, *statistics, out.shape[1], ctx.relu)
        else:
            grad = RELU_BACKWARD(grad, out) if ctx.relu else grad
            sums = SUMS(grad) if ctx.needs_input_grad[2] else None
        for_x, for_weight = _products(ctx.needs_input_grad, grad, x, weight)
        for_bias = sums.view(len(sums), 1, -1).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, None, None


def _products(needed: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor) -> Any:
    """Return the gradients of `x` and `weight`, None for those that are not needed."""
    for_x = torch.bmm(grad, weight.transpose(1, 2)) if needed[0] else None
    for_weight = torch.bmm(x.transpose(1, 2), grad) if needed[1] else None
    return for_x, for_weight


def normalized_sum(
    x: Float[Tensor, "stack task batch width"], added: Float[Tensor, "stack task width"]
) -> Float[Tensor, "stack task batch width"]:
    """Return `relu(norm(x + added))`, with one row of `added` per task."""
    out: Tensor = _NormalizedSum.apply(x.contiguous(), added.contiguous())
    return out


class _NormalizedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor) -> Tensor:
        out, mean, rstd = NORM(x, added, None, x.shape[2], True)
        ctx.save_for_backward(x, added, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, added, mean, rstd = ctx.saved_tensors
        for_x, sums = NORM_BACKWARD(grad.contiguous(), x, added, mean, rstd, x.shape[2], True)
        return for_x, sums.view(added.shape).to(added.dtype)


def block(
    x: Float[Tensor, "stack rows width"], *weights: Tensor
) -> Float[Tensor, "stack rows width"]:
    """Return `x + LN(Dense(ReLU(LN(Dense x))))`, given weight and bias of both layers."""
    out: Tensor = _Block.apply(x.contiguous(), *weights)
    return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        rows = x.shape[1]
        first = torch.baddbmm(b1, x, w1)
        hidden, *statistics1 = NORM(first, None, None, rows, True)
        second = torch.baddbmm(b2, hidden, w2)
        out, *statistics2 = NORM(second, None, x, rows, False)
        ctx.save_for_backward(x, w1, w2, first, *statistics1, hidden, second, *statistics2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, first, mean1, rstd1, hidden, second, mean2, rstd2 = ctx.saved_tensors
        grad, rows = grad.contiguous(), x.shape[1]
        for_second, sums2 = NORM_BACKWARD(grad, second, None, mean2, rstd2, rows, False)
        for_hidden = torch.bmm(for_second, w2.transpose(1, 2))
        for_first, sums1 = NORM_BACKWARD(for_hidden, first, None, mean1, rstd1, rows, True)
        for_x = torch.baddbmm(grad, for_first, w1.transpose(1, 2))
        if not ctx.needs_input_grad[1]:
            return for_x, None, None, None, None
        return (
            for_x,
            torch.bmm(x.transpose(1, 2), for_first),
            sums1.view(len(sums1), 1, -1).to(x.dtype),
            torch.bmm(hidden.transpose(1, 2), for_second),
            sums2.view(len(sums2), 1, -1).to(x.dtype),
        )


def normalize(x: Float[Tensor, "*rows width"], relu: bool) -> Float[Tensor, "*rows width"]:
    """Normalize the last axis to mean 0 and variance 1, then apply ReLU if `relu`."""
    out: Tensor = _Norm.apply(x.contiguous(), relu)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: bool) -> Tensor:
        out, mean, rstd = NORM(x, None, None, _rows(x), relu)
        ctx.relu = relu
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, rstd = ctx.saved_tensors
        for_x, _ = NORM_BACKWARD(grad.contiguous(), x, None, mean, rstd, _rows(x), ctx.relu)
        return for_x, None


def unit(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Divide rows in fp32 by their norms (see `torch.nn.functional.normalize`)."""
    out: Tensor = _Unit.apply(x.contiguous())
    return out


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return UNIT(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return UNIT_BACKWARD(grad.contiguous(), *ctx.saved_tensors)


def relu(x: Tensor) -> Tensor:
    """Return the ReLU of a tensor."""
    out: Tensor = _ReLU.apply(x.contiguous())
    return out


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out: Tensor = RELU(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return RELU_BACKWARD(grad.contiguous(), *ctx.saved_tensors)


def product(
    x: Float[Tensor, "*group batch width"], y: Float[Tensor, "*group one width"], relu: bool
) -> Float[Tensor, "*group batch width"]:
    """Return `x * y`, with ReLU if `relu`; both have the same dtype.

    Each row of `y` multiplies one row of `x`, or all rows of a group.
    """
    out: Tensor = _Product.apply(x.contiguous(), y.contiguous(), relu)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, relu: bool) -> Tensor:
        out: Tensor = PRODUCT(x, y, relu)
        ctx.relu = relu
        ctx.save_for_backward(x, y, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *PRODUCT_BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.relu), None


def softmax(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Return the softmax over the last axis."""
    out: Tensor = _Softmax.apply(x.contiguous())
    return out


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out: Tensor = SOFTMAX(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SOFTMAX_BACKWARD(grad.contiguous(), *ctx.saved_tensors)


def mix(
    outputs: Float[Tensor, "stack source rows width"],
    route: Float[Tensor, "stack rows target source"],
    relu: bool,
) -> Float[Tensor, "stack target rows width"]:
    """Compute `softmod.networks.mixing.mix` for `outputs` and `route` of the same dtype."""
    mixed: Tensor = _Mix.apply(outputs, route.contiguous(), relu)
    return mixed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, route: Tensor, relu: bool) -> Tensor:
        mixed: Tensor = MIX(outputs, route, relu)
        ctx.save_for_backward(outputs, route, mixed if relu else None)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *MIX_BACKWARD(grad.contiguous(), *ctx.saved_tensors), None


# --- PyTorch operations ---------------------------------------------------------------------------


def _letter(tensor: Tensor) -> str:
    return LETTER[tensor.dtype]


def _rows(tensor: Tensor) -> int:
    return tensor[..., 0].numel()


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _bind_norm(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x, added, residual, batch, relu = args
    return call(
        f"norm_{_letter(x)}", UPDATE, x, added, residual, *outputs, _rows(x), x.shape[-1], batch,
        EPS, relu,
    )  # fmt: skip


def _bind_norm_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    *tensors, batch, relu = args
    x = args[1]
    name = f"norm_backward_{_letter(x)}"
    return call(name, UPDATE, *tensors, *outputs, _rows(x), x.shape[-1], batch, relu)


def _bind_unit(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call("unit", UPDATE, *args, *outputs, _rows(args[0]), args[0].shape[-1], LEAST_NORM)


def _bind_unit_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    rows, width = _rows(args[1]), args[1].shape[-1]
    return call("unit_backward", UPDATE, *args, *outputs, rows, width, LEAST_NORM)


def _bind_sums(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call(f"sums_{_letter(args[0])}", UPDATE, *args, *outputs, *args[0].shape)


def _bind_relu(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call(f"relu_{_letter(args[0])}", UPDATE, *args, *outputs, args[0].numel())


def _bind_relu_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call(f"relu_backward_{_letter(args[0])}", UPDATE, *args, *outputs, args[0].numel())


def _bind_product(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x, y, relu = args
    name = f"product_{_letter(x)}"
    return call(
        name, UPDATE, x, y, *outputs, _rows(x), x.shape[-1], _rows(x) // max(_rows(y), 1), relu
    )


def _bind_product_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    *tensors, relu = args
    x, y = args[1:3]
    name = f"product_backward_{_letter(x)}"
    groups = _rows(y)
    return call(
        name, UPDATE, *tensors, *outputs, groups, x.shape[-1], _rows(x) // max(groups, 1), relu
    )


def _bind_softmax(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x = args[0]
    return call(f"softmax_{_letter(x)}", UPDATE, x, *outputs, _rows(x), x.shape[-1])


def _bind_softmax_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x = args[1]
    name = f"softmax_backward_{_letter(x)}"
    return call(name, UPDATE, *args, *outputs, _rows(x), x.shape[-1])


def _strides(outputs: Tensor) -> Any:
    return (ctypes.c_int64 * 3)(*outputs.stride()[:3])


def _bind_mix(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    x, route, relu = args
    stack, rows, targets, sources = route.shape
    return call(
        f"mix_{_letter(x)}", UPDATE, x, _strides(x), route, *outputs, stack, targets, sources,
        rows, x.shape[-1], relu,
    )  # fmt: skip


def _bind_mix_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    grad, x, route, mixed = args
    stack, rows, targets, sources = route.shape
    return call(
        f"mix_backward_{_letter(x)}", UPDATE, grad, x, _strides(x), route, mixed, *outputs, stack,
        targets, sources, rows, x.shape[-1],
    )  # fmt: skip


NORM = operation(
    "norm(Tensor x, Tensor? added, Tensor? residual, int batch, bool relu)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    lambda x, *_: (torch.empty_like(x), _statistics(x), _statistics(x)),
    _bind_norm,
)
NORM_BACKWARD = operation(
    "norm_backward(Tensor grad, Tensor x, Tensor? added, Tensor mean, Tensor rstd, int batch,"
    " bool relu) -> (Tensor for_x, Tensor sums)",
    lambda grad, x, added, mean, rstd, batch, relu: (
        torch.empty_like(x),
        mean.new_empty(_rows(x) // max(batch, 1), x.shape[-1]),
    ),
    _bind_norm_backward,
)
UNIT = operation("unit(Tensor x) -> Tensor", lambda x: (torch.empty_like(x),), _bind_unit)
UNIT_BACKWARD = operation(
    "unit_backward(Tensor grad, Tensor x) -> Tensor",
    lambda grad, x: (torch.empty_like(x),),
    _bind_unit_backward,
)
SUMS = operation(
    "sums(Tensor x) -> Tensor",
    lambda x: (x.new_empty((len(x), x.shape[-1]), dtype=torch.float32),),
    _bind_sums,
)
RELU = operation("relu(Tensor x) -> Tensor", lambda x: (torch.empty_like(x),), _bind_relu)
RELU_BACKWARD = operation(
    "relu_backward(Tensor grad, Tensor out) -> Tensor",
    lambda grad, out: (torch.empty_like(out),),
    _bind_relu_backward,
)
PRODUCT = operation(
    "product(Tensor x, Tensor y, bool relu) -> Tensor",
    lambda x, y, relu: (torch.empty_like(x),),
    _bind_product,
)
PRODUCT_BACKWARD = operation(
    "product_backward(Tensor grad, Tensor x, Tensor y, Tensor out, bool relu)"
    " -> (Tensor for_x, Tensor for_y)",
    lambda grad, x, y, out, relu: (torch.empty_like(x), torch.empty_like(y)),
    _bind_product_backward,
)
SOFTMAX = operation("softmax(Tensor x) -> Tensor", lambda x: (torch.empty_like(x),), _bind_softmax)
SOFTMAX_BACKWARD = operation(
    "softmax_backward(Tensor grad, Tensor out) -> Tensor",
    lambda grad, out: (torch.empty_like(out),),
    _bind_softmax_backward,
)
MIX = operation(
    "mix(Tensor outputs, Tensor route, bool relu) -> Tensor",
    lambda outputs, route, relu: (
        outputs.new_empty((len(route), route.shape[2], *outputs.shape[2:])),
    ),
    _bind_mix,
)
MIX_BACKWARD = operation(
    "mix_backward(Tensor grad, Tensor outputs, Tensor route, Tensor? mixed)"
    " -> (Tensor for_outputs, Tensor for_route)",
    lambda grad, outputs, route, mixed: (
        torch.empty_strided(outputs.shape, outputs.stride(), dtype=outputs.dtype),
        torch.empty_like(route),
    ),
    _bind_mix_backward,
)
