"""The soft connection between two layers of modules (Eq. 8), with a custom gradient.

Batched products of small `modules x modules` matrices are slow. Sums of scaled slices read and
write each activation once per module and copy nothing into another layout.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from softmod import kernels


def mix(
    outputs: Float[Tensor, "stack source rows width"],
    route: Float[Tensor, "stack rows target source"],
    relu: bool = False,
) -> Float[Tensor, "stack target rows width"]:
    """Return `sum_j phat_ij g_j` for every target i and row (Eq. 8), with ReLU if `relu`."""
    if kernels.compiling():  # the compiler generates faster code from the formula
        mixed: Tensor = (route.permute(0, 2, 3, 1).unsqueeze(-1) * outputs.unsqueeze(1)).sum(2)
        return mixed.relu() if relu else mixed
    if kernels.fits(outputs, route) and outputs.dtype == route.dtype and outputs.stride(-1) == 1:
        return kernels.layers.mix(outputs, route, relu)
    if not torch.is_grad_enabled():
        return forward(outputs, route, relu)[0]
    mixed = _Mix.apply(outputs, route, relu)
    return mixed


def forward(outputs: Tensor, route: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Return the mixture and its weights `[stack, target, source, rows, 1]`."""
    weights = route.permute(0, 2, 3, 1).contiguous().unsqueeze(-1)
    mixed = torch.empty(
        (*weights.shape[:2], *outputs.shape[2:]), dtype=outputs.dtype, device=outputs.device
    )
    weighted_sum(mixed, weights, outputs)
    return (mixed.relu_() if relu else mixed), weights


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, route: Tensor, relu: bool) -> Tensor:
        mixed, weights = forward(outputs, route, relu)
        ctx.relu = relu
        ctx.save_for_backward(outputs, weights, mixed if relu else outputs)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        outputs, weights, mixed = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, mixed, 0)
        for_outputs = for_route = None
        if ctx.needs_input_grad[0]:
            for_outputs = torch.empty_like(outputs)  # keeps the memory layout of the outputs
            weighted_sum(for_outputs, weights.transpose(1, 2), grad)
        if ctx.needs_input_grad[1]:
            # Shapes are (stack, source, rows).
            per_target = [(outputs * target.unsqueeze(1)).sum(-1) for target in grad.unbind(1)]
            for_route = torch.stack(per_target, 1).permute(0, 3, 1, 2)
        return for_outputs, for_route, None


def weighted_sum(
    total: Float[Tensor, "stack target rows width"],
    weights: Float[Tensor, "stack target source rows 1"],
    terms: Float[Tensor, "stack source rows width"],
) -> None:
    """Write `sum_source weights * terms` into `total`."""
    for source, term in enumerate(terms.unsqueeze(1).unbind(2)):
        if source == 0:
            torch.mul(weights[:, :, source], term, out=total)
        else:
            total.addcmul_(weights[:, :, source], term)
