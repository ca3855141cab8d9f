"""Parts of an update besides its losses: clipping, the finite flag, rollback, target networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmod import kernels

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}  # integer types of the same size


@torch.no_grad()
def clip_stacked(
    parameters: Sequence[Tensor], stack: int, max_norm: float
) -> Float[Tensor, " stack"]:
    """Clip the gradient norm of each member of a stack separately (8).

    Args:
        parameters: leading axes are `stack`, or `stack * modules` with the members outermost.
        stack: the number of members.
        max_norm: the largest norm; 0: no clipping.

    Returns:
        The norms before clipping.
    """
    grads = [p.grad.view(stack, -1) for p in parameters if p.grad is not None]
    norms = []
    for member in range(stack):
        parts = [grad[member] for grad in grads]
        norm = torch.stack(torch._foreach_norm(parts)).norm()
        if max_norm:
            torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        norms.append(norm)
    return torch.stack(norms)


def all_finite(*tensors: Tensor) -> Bool[Tensor, ""]:
    """Return a flag on the device: True if all elements are finite."""
    if all(map(kernels.in_fp32, tensors)):
        return kernels.optimizer.all_finite(tensors)
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).isfinite().all()


def materialize(optimizer: torch.optim.Optimizer) -> None:
    """Initialize an optimizer's state with zeros, so that it can be saved and rolled back.

    The state is created by a step. Its effect on the parameters, such as weight decay, is undone.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)
    for value in _tensors(optimizer):
        value.zero_()
    optimizer.zero_grad()


def _tensors(optimizer: Any) -> Iterable[Tensor]:
    return (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


class Rollback:
    """A copy of the state that an optimizer step changes, restored if the update is not finite."""

    def __init__(self, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters: list[Tensor] = parameters
        self.live = [*(p.detach() for p in parameters), *_tensors(optimizer)]
        self.copies = [torch.empty_like(tensor) for tensor in self.live]
        self.saved = torch.ones((), dtype=torch.bool, device=self.live[0].device)

    @property
    def touched(self) -> list[Tensor]:
        """Return the tensors that the rollback reads and writes."""
        return [*self.live, *self.copies, self.saved]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the current state."""
        torch._foreach_copy_(self.copies, self.live)

    @torch.no_grad()
    def leave_to_step(self) -> None:
        """Leave the copying to the step, which sets `saved`."""
        self.saved.zero_()

    def kept(self, optimizer: Any) -> list[list[Tensor]]:
        """Return the copies of parameters, first and second moments, and steps.

        Parameters without a gradient are copied now, since a step does not change them.
        """
        copies = {id(live): copy for live, copy in zip(self.live, self.copies, strict=True)}
        lists = [self.copies[: len(self.parameters)]]
        for name in ("exp_avg", "exp_avg_sq", "step"):
            lists.append([copies[id(optimizer.state[p][name])] for p in self.parameters])
        for number, parameter in enumerate(self.parameters):
            if kernels.gradient(parameter) is None:
                state = optimizer.state[parameter]
                own = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])
                torch._foreach_copy_([copy[number] for copy in lists], list(own))
        return lists

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the copied state, if the update has copied it."""
        if self.saved:
            torch._foreach_copy_(self.live, self.copies)

    @torch.no_grad()
    def restore_unless(self, finite: Bool[Tensor, ""]) -> None:
        """Restore the copied state unless `finite`; on a GPU, without waiting for the flag."""
        if finite.device.type == "cpu":
            if not finite:
                self.restore()
            return
        choose(self.live, self.copies, finite)


@torch.no_grad()
def choose(live: list[Tensor], copies: list[Tensor], keep: Bool[Tensor, ""]) -> None:
    """Overwrite the live tensors with their copies unless `keep`, without waiting for the flag.

    The copies are overwritten. All tensors share few kernel launches, which dominate the time of a
    small update on a GPU. Values are selected on their bit patterns, because NaN x 0 = NaN.
    """
    live_bits, copied_bits = (
        [tensor.view(BITS[tensor.dtype]) for tensor in tensors] for tensors in (live, copies)
    )
    torch._foreach_mul_(live_bits, keep.int())
    torch._foreach_mul_(copied_bits, (~keep).int())
    torch._foreach_add_(live_bits, copied_bits)


@torch.no_grad()
def drift(targets: list[Tensor], sources: list[Tensor], share: Float[Tensor, ""]) -> None:
    """Add `share (source - target)` to each target in few launches, without waiting for `share`."""
    difference = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(targets, difference)


def step_if(optimizer: Any, finite: Bool[Tensor, ""]) -> None:
    """Step an optimizer if the update is finite.

    On a GPU, a fused optimizer reads the flag on the device; other optimizers wait for it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Fabric's wrapper
    if finite.device.type == "cpu" or not inner.defaults.get("fused"):
        if finite:
            optimizer.step()
        return
    inner.found_inf = (~finite).float()
    inner.grad_scale = torch.ones((), device=finite.device)
    optimizer.step()


@torch.no_grad()
def move_targets(
    targets: Sequence[Tensor], sources: Sequence[Tensor], smoothing: float, finite: Bool[Tensor, ""]
) -> None:
    """Add `smoothing (source - target)` to each target if the update is finite."""
    targets = list(targets)
    sources = list(sources)
    if kernels.version_in_use() >= kernels.UPDATE and all(
        tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in (*targets, *sources)
    ):
        if finite:
            kernels.optimizer.move(targets, sources, smoothing)
        return
    if finite.device.type == "cpu":
        if finite:
            torch._foreach_lerp_(targets, sources, smoothing)
        return
    drift(targets, sources, smoothing * finite.float())
