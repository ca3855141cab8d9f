"""Steps on flat buffers as tensor arithmetic, without reading a flag on the host.

A compiler fuses them, and recordings contain them. `softmod.kernels.triton_steps` has the same
functions as Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmod.kernels.flat import FlatAdam

SMALLEST = 1e-6  # added to a norm before division, as in `torch.nn.utils.clip_grad_norm_`


@torch.no_grad()
def norms(own: FlatAdam, gradient: Float[Tensor, " number"]) -> Float[Tensor, " stack"]:
    """Return the gradient norm of each member."""
    rows = gradient[None] if own.members == 1 else gradient[own.by_member]
    return rows.square().sum(1).sqrt()


@torch.no_grad()
def all_finite(values: Sequence[Tensor], also: Bool[Tensor, ""] | None = None) -> Bool[Tensor, ""]:
    """Return True if all elements are finite, and `also` is True."""
    finite = torch.cat([value.detach().reshape(-1) for value in values]).isfinite().all()
    return finite if also is None else finite & also


@torch.no_grad()
def adam(
    own: FlatAdam,
    gradient: Float[Tensor, " number"],
    finite: Bool[Tensor, ""],
    *,
    norms: Float[Tensor, " stack"] | None = None,
    max_norm: float = 0.0,
    keep: bool = False,
    target: Float[Tensor, " number"] | None = None,
    smoothing: float = 0.0,
    half: Tensor | None = None,
    limit: float = 0.0,
) -> None:
    """Step with a gradient clipped per member, unless the update is not finite.

    Args:
        own: weights, moments and steps; changed in place.
        gradient: the gradient, in the layout of the weights.
        finite: the flag.
        norms: the gradient norm of each member; None: no clipping.
        max_norm: the largest norm; 0: no clipping.
        keep: keep weights, moments and steps as before the step for `settle`.
        target: weights that move towards the new weights by `smoothing`.
        smoothing: the share of the new weights in `target`.
        half: receives the new weights in bfloat16.
        limit: weights are clamped to +-limit; 0: not clamped.
    """
    options = own.options
    if keep:
        own.clones = [tensor.clone() for tensor in own.state]
    if norms is not None and max_norm:
        factor = (max_norm / (norms + SMALLEST)).clamp(max=1.0)
        gradient = gradient * (factor if own.members == 1 else factor[own.member])
    weights = own.weights
    if options.weight_decay and options.decoupled:
        weights = weights * (1.0 - options.lr * options.weight_decay)
    elif options.weight_decay:
        gradient = gradient + options.weight_decay * weights
    first = torch.lerp(own.first, gradient, 1.0 - options.beta1)
    second = torch.lerp(own.second, gradient * gradient, 1.0 - options.beta2)
    # All parameters with a gradient have made the same number of steps.
    step = own.steps.amax() + 1.0
    correction1 = -torch.expm1(step * options.log_beta1)
    correction2 = -torch.expm1(step * options.log_beta2)
    denominator = second.sqrt() / correction2.sqrt() + options.eps
    weights = weights - (options.lr / correction1) * first / denominator
    if limit:
        weights = weights.clamp(-limit, limit)
    changes = finite if own.stepped is None else finite & own.stepped
    for state, new in ((own.weights, weights), (own.first, first), (own.second, second)):
        state.copy_(torch.where(changes, new, state))
    own.steps.copy_(own.steps + finite * own.counted)
    if target is not None:
        move(target, own.weights, smoothing, finite)
    if half is not None:
        half.copy_(own.weights)


@torch.no_grad()
def settle(
    own: FlatAdam,
    made: Bool[Tensor, ""],
    finite: Bool[Tensor, ""],
    target: Float[Tensor, " number"] | None = None,
    smoothing: float = 0.0,
) -> None:
    """Undo a step unless `finite`; else move `target` towards the weights.

    Args:
        own: weights, moments and steps; changed in place.
        made: the flag with which the step was called.
        finite: the flag of the whole update; False if `made` is.
        target: moves towards the weights by `smoothing`.
        smoothing: the share of the weights in `target`.
    """
    for state, kept in zip(own.state, own.clones, strict=True):
        state.copy_(torch.where(finite, state, kept))
    if target is not None:
        move(target, own.weights, smoothing, finite)


@torch.no_grad()
def move(target: Tensor, source: Tensor, smoothing: float, finite: Bool[Tensor, ""]) -> None:
    """Add `smoothing (source - target)` to a target if the update is finite."""
    target.copy_(torch.where(finite, target + smoothing * (source - target), target))
