"""Steps on flat buffers as Triton kernels, on CUDA (see `softmod.kernels.formulas`).

Sums are made in a fixed order, so results are deterministic. Nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from softmod.kernels.flat import BLOCK, FlatAdam

SMALLEST = tl.constexpr(1e-6)  # added to a norm before division
MOST = 4  # tensors that `all_finite` reads


@torch.no_grad()
def norms(own: FlatAdam, gradient: Float[Tensor, " number"]) -> Float[Tensor, " stack"]:
    """Return the gradient norm of each member; also keep the numbers of steps for `adam`."""
    count = len(own.blocks)
    sums = gradient.new_empty(own.members, count)
    made = gradient.new_empty(own.members)
    _sums[(count, own.members)](gradient, own.blocks, sums, count, block=BLOCK)
    _norms[(own.members,)](
        sums, made, own.steps, own.kept[3], count, len(own.steps), block=BLOCK,
        most=triton.next_power_of_2(len(own.steps)),
    )  # fmt: skip
    return made


@torch.no_grad()
def all_finite(values: Sequence[Tensor], also: Bool[Tensor, ""] | None = None) -> Bool[Tensor, ""]:
    """Return True if all elements of at most four tensors are finite, and `also` is True."""
    flag = torch.empty((), dtype=torch.bool, device=values[0].device)
    own = [value.detach().contiguous() for value in values]
    padded = own + own[:1] * (MOST - len(own))
    sizes = [value.numel() for value in own] + [0] * (MOST - len(own))
    _all_finite[(1,)](
        *padded, *sizes, flag if also is None else also, flag, given=also is not None,
        block=triton.next_power_of_2(max(sizes)),
    )  # fmt: skip
    return flag


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
    """Step with a gradient clipped per member (see `formulas.adam`)."""
    options = own.options
    before = own.kept[3]
    if norms is None:
        before.copy_(own.steps)
    _adam[(len(own.blocks), own.members)](
        own.weights, own.first, own.second, gradient, own.steps, before, own.blocks, finite,
        own.weights if norms is None else norms, own.kept[0], own.kept[1], own.kept[2],
        own.weights if target is None else target, own.weights if half is None else half,
        lr=options.lr, share1=1.0 - options.beta1, share2=1.0 - options.beta2,
        log_beta1=options.log_beta1, log_beta2=options.log_beta2, eps=options.eps,
        weight_decay=options.weight_decay, decoupled=options.decoupled,
        max_norm=0.0 if norms is None else max_norm, keep=keep, moves=target is not None,
        smoothing=smoothing, halves=half is not None, limit=limit, block=BLOCK,
    )  # fmt: skip


@torch.no_grad()
def settle(
    own: FlatAdam,
    made: Bool[Tensor, ""],
    finite: Bool[Tensor, ""],
    target: Float[Tensor, " number"] | None = None,
    smoothing: float = 0.0,
) -> None:
    """Undo a step unless `finite`; else move `target` (see `formulas.settle`)."""
    _settle[(len(own.blocks), own.members)](
        own.weights, own.first, own.second, own.steps, *own.kept,
        own.weights if target is None else target, own.blocks, made, finite,
        moves=target is not None, smoothing=smoothing, block=BLOCK,
    )  # fmt: skip


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _places(blocks, block: tl.constexpr):
    """Return the places of a program's elements, which of them exist, and the parameter."""
    row = blocks + tl.program_id(0) * 4
    start = tl.load(row) + tl.program_id(1) * tl.load(row + 1)
    inside = tl.arange(0, block)
    return start + inside, inside < tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _sums(gradient, blocks, sums, count, block: tl.constexpr):
    """Write the sum of squares of each block, `[stack, block]`."""
    places, exist, _ = _places(blocks, block)
    g = tl.load(gradient + places, mask=exist, other=0.0)
    tl.store(sums + tl.program_id(1) * count + tl.program_id(0), tl.sum(g * g))


@triton.jit
def _norms(
    sums, norms, steps, before, count, parameters,
    block: tl.constexpr, most: tl.constexpr,
):  # fmt: skip
    """Write the norm of a member; the first program copies the numbers of steps."""
    member = tl.program_id(0)
    inside = tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, count, block):
        exist = start + inside < count
        total += tl.load(sums + member * count + start + inside, mask=exist, other=0.0)
    tl.store(norms + member, tl.sqrt(tl.sum(total)))
    if member == 0:
        number = tl.arange(0, most)
        step = tl.load(steps + number, mask=number < parameters)
        tl.store(before + number, step, mask=number < parameters)


@triton.jit
def _count_odd(values, size, block: tl.constexpr):
    """Return the number of elements that are not finite; for those, x - x is NaN."""
    places = tl.arange(0, block)
    x = tl.load(values + places, mask=places < size, other=0.0).to(tl.float32)
    rest = x - x
    return tl.sum((rest != rest).to(tl.int32))


@triton.jit
def _all_finite(
    a, b, c, d, size_a, size_b, size_c, size_d, also,
    flag, given: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write whether all elements of four tensors are finite."""
    odd = _count_odd(a, size_a, block) + _count_odd(b, size_b, block)
    odd += _count_odd(c, size_c, block) + _count_odd(d, size_d, block)
    finite = odd == 0
    if given:
        finite = finite & (tl.load(also) != 0)
    tl.store(flag, finite)


@triton.jit
def _adam(
    weights, first, second, gradient, steps, before, blocks,
    finite, norms, kept_weights, kept_first, kept_second, target,
    half, lr: tl.constexpr, share1: tl.constexpr, share2: tl.constexpr,
    log_beta1: tl.constexpr, log_beta2: tl.constexpr, eps: tl.constexpr,
    weight_decay: tl.constexpr, decoupled: tl.constexpr, max_norm: tl.constexpr,
    keep: tl.constexpr, moves: tl.constexpr, smoothing: tl.constexpr, halves: tl.constexpr,
    limit: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Step the elements of a block unless the update is not finite."""
    if tl.load(finite) != 0:
        places, exist, parameter = _places(blocks, block)
        w = tl.load(weights + places, mask=exist, other=0.0)
        m = tl.load(first + places, mask=exist, other=0.0)
        v = tl.load(second + places, mask=exist, other=0.0)
        g = tl.load(gradient + places, mask=exist, other=0.0)
        if keep:
            tl.store(kept_weights + places, w, mask=exist)
            tl.store(kept_first + places, m, mask=exist)
            tl.store(kept_second + places, v, mask=exist)
        if max_norm > 0.0:
            norm = tl.load(norms + tl.program_id(1))
            g = g * tl.minimum(max_norm / (norm + SMALLEST), 1.0)
        if decoupled:
            w = w - lr * weight_decay * w
        elif weight_decay > 0.0:
            g = g + weight_decay * w
        m = m + share1 * (g - m)
        v = v + share2 * (g * g - v)
        step = tl.load(before + parameter) + 1.0
        # In double precision, because 1 - beta^step is a small difference of large numbers.
        correction1 = (1.0 - tl.exp(step.to(tl.float64) * log_beta1)).to(tl.float32)
        correction2 = (1.0 - tl.exp(step.to(tl.float64) * log_beta2)).to(tl.float32)
        w = w - (lr / correction1) * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
        if limit > 0.0:
            w = tl.minimum(tl.maximum(w, -limit), limit)
        tl.store(weights + places, w, mask=exist)
        tl.store(first + places, m, mask=exist)
        tl.store(second + places, v, mask=exist)
        # All blocks of a parameter write the same number.
        tl.store(steps + parameter, step)
        if moves:
            t = tl.load(target + places, mask=exist, other=0.0)
            tl.store(target + places, t + smoothing * (w - t), mask=exist)
        if halves:
            tl.store(half + places, w.to(tl.bfloat16), mask=exist)


@triton.jit
def _settle(
    weights, first, second, steps, kept_weights, kept_first,
    kept_second, kept_steps, target, blocks, made, finite,
    moves: tl.constexpr, smoothing: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Move the target of a block if the update is finite; undo the block's step if not."""
    places, exist, parameter = _places(blocks, block)
    if tl.load(finite) != 0:
        if moves:
            w = tl.load(weights + places, mask=exist, other=0.0)
            t = tl.load(target + places, mask=exist, other=0.0)
            tl.store(target + places, t + smoothing * (w - t), mask=exist)
    elif tl.load(made) != 0:
        tl.store(weights + places, tl.load(kept_weights + places, mask=exist), mask=exist)
        tl.store(first + places, tl.load(kept_first + places, mask=exist), mask=exist)
        tl.store(second + places, tl.load(kept_second + places, mask=exist), mask=exist)
        tl.store(steps + parameter, tl.load(kept_steps + parameter))
