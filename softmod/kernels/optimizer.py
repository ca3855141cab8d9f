"""Gradient norms, clipping, Adam, the copy that undoes it, and target networks in few passes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmod.kernels.binding import Call, call, operation, sizes
from softmod.kernels.halves import gradient, has_copy, renew
from softmod.kernels.switch import UPDATE, version_in_use

# Options of Adam that change its steps, and the values that the kernel supports.
PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False}


def supports(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether version 2 is in use and `adam` makes this optimizer's steps."""
    if version_in_use() < UPDATE or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    (group, *others) = optimizer.param_groups
    parameters = group["params"]
    return (
        not others
        and bool(group["fused"])
        and all(group[name] == value for name, value in PLAIN.items())
        and not any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))
        and all(p.dtype is torch.float32 and p.is_contiguous() for p in parameters)
        and all(p.device.type == "cpu" for p in parameters)
    )


@torch.no_grad()
def gradient_norms(parameters: Sequence[Tensor], stack: int) -> Float[Tensor, " stack"]:
    """Return the gradient norm of each member of a stack (see `clip_stacked`)."""
    grads = [grad.contiguous() for p in parameters if (grad := gradient(p)) is not None]
    norms: Tensor = NORMS(grads, stack)
    return norms


@torch.no_grad()
def adam(
    optimizer: torch.optim.Optimizer,
    *,
    norms: Float[Tensor, " stack"] | None = None,
    max_norm: float = 0.0,
    kept: Sequence[Sequence[Tensor]] = (),
    saved: Bool[Tensor, ""] | None = None,
    targets: Sequence[Tensor] = (),
    smoothing: float = 0.0,
) -> None:
    """Step an optimizer with gradients clipped to `max_norm` (0: no clipping).

    Args:
        optimizer: one that `supports` accepts, with initialized state.
        norms: the gradient norm of each member of the parameters' stack; None: no clipping.
        max_norm: the largest norm of a member's gradient.
        kept: receive copies of parameters, first and second moments, and steps, as before the step,
            for parameters with a gradient.
        saved: set to True if `kept` is given.
        targets: move towards the new parameters by `smoothing`.
        smoothing: the share of the new parameters in the targets.
    """
    (group,) = optimizer.param_groups
    gradients = {i: gradient(p) for i, p in enumerate(group["params"])}
    grads = {i: grad.contiguous() for i, grad in gradients.items() if grad is not None}
    used = list(grads)
    parameters = [group["params"][i] for i in used]
    state = [optimizer.state[p] for p in parameters]
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    options = [
        float(group["lr"]), *map(float, group["betas"]), float(group["eps"]),
        float(group["weight_decay"]), float(decoupled), float(max_norm), float(smoothing),
    ]  # fmt: skip
    copied = [i for i, p in enumerate(parameters) if has_copy(p)]
    made = ADAM(
        [p.detach() for p in parameters],
        list(grads.values()),
        *([own[name] for own in state] for name in ("exp_avg", "exp_avg_sq", "step")),
        [own[i] for own in kept for i in used],
        [targets[i] for i in used] if targets else [],
        [] if saved is None else [saved],
        norms,
        options,
        copied,
    )
    renew([parameters[i] for i in copied], made)


@torch.no_grad()
def move(targets: Sequence[Tensor], sources: Sequence[Tensor], smoothing: float) -> None:
    """Add `smoothing (source - target)` to each target."""
    MOVE(list(targets), list(sources), smoothing)


@torch.no_grad()
def all_finite(values: Sequence[Tensor]) -> Bool[Tensor, ""]:
    """Return True if all elements of fp32 tensors are finite."""
    flag: Tensor = ALL_FINITE([value.detach().contiguous() for value in values])
    return flag


# --- PyTorch operations ---------------------------------------------------------------------------


def _halves(tensors: Sequence[Tensor]) -> Any:
    halves = [int(tensor.dtype is torch.bfloat16) for tensor in tensors]
    return (ctypes.c_int32 * len(halves))(*halves)


def _bind_norms(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    grads, stack = args
    return call(
        "gradient_norms", UPDATE, grads, _halves(grads), sizes(grads), len(grads), stack, *outputs
    )


def _bind_adam(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    parameters, grads, first, second, steps, kept, targets, saved, norms, options, copied = args
    copies: list[Tensor | None] = [None] * len(parameters)
    for i, copy in zip(copied, outputs, strict=True):
        copies[i] = copy
    stack = 1 if norms is None else len(norms)
    numbers = (ctypes.c_double * len(options))(*options)
    return call(
        "adam", UPDATE, parameters, grads, _halves(grads), first, second, steps, kept or None,
        targets or None, copies if copied else None, sizes(parameters), len(parameters), norms,
        stack, saved[0] if saved else None, numbers,
    )  # fmt: skip


def _bind_move(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    targets, sources, smoothing = args
    return call("move", UPDATE, targets, sources, sizes(targets), len(targets), float(smoothing))


def _bind_all_finite(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call("all_finite", UPDATE, args[0], sizes(args[0]), len(args[0]), *outputs)


NORMS = operation(
    "gradient_norms(Tensor[] grads, int stack) -> Tensor",
    lambda grads, stack: (torch.empty(stack),),
    _bind_norms,
)
ADAM = operation(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second,"
    " Tensor(d!)[] steps, Tensor(e!)[] kept, Tensor(f!)[] targets, Tensor(g!)[] saved,"
    " Tensor? norms, float[] options, int[] copied) -> Tensor[]",
    lambda parameters, *rest: [
        torch.empty_like(parameters[i], dtype=torch.bfloat16) for i in rest[-1]
    ],
    _bind_adam,
)
MOVE = operation(
    "move_(Tensor(a!)[] targets, Tensor[] sources, float smoothing) -> ()",
    lambda *_: (),
    _bind_move,
)
ALL_FINITE = operation(
    "all_finite(Tensor[] values) -> Tensor",
    lambda values: (torch.empty((), dtype=torch.bool),),
    _bind_all_finite,
)
