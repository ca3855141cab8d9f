"""What surrounds the losses of an update: clipping, the finite flag that gates everything, moving
targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}  # whole numbers of the same size


@torch.no_grad()
def clip_stacked(
    parameters: Sequence[Tensor], stack: int, max_norm: float
) -> Float[Tensor, " stack"]:
    """Clip the gradient norm of each member of a stack by itself (8); the norms before. 0 measures
    only.

    Leading axes of the parameters are `stack`, or `stack * modules` with the members outermost.
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
    """One flag on the device: losses and gradient norms are all numbers."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).isfinite().all()


def materialize(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's state exist, as zeros, so that it can be saved, restored and rolled back
    from the start.

    A step makes it; what the step did to the parameters, such as weight decay, is taken back.
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
    """A copy of what a step is about to change, to put back if the update turns out not to be
    finite.
    """

    def __init__(self, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.live = [*(p.detach() for p in parameters), *_tensors(optimizer)]
        self.copies = [torch.empty_like(tensor) for tensor in self.live]

    @property
    def touched(self) -> list[Tensor]:
        """Return the tensors that it reads and writes."""
        return [*self.live, *self.copies]

    @torch.no_grad()
    def remember(self) -> None:
        torch._foreach_copy_(self.copies, self.live)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.live, self.copies)

    @torch.no_grad()
    def unless(self, finite: Bool[Tensor, ""]) -> None:
        """Put everything back unless `finite`; on an accelerator without waiting for the flag."""
        if finite.device.type == "cpu":
            if not finite:
                self.restore()
            return
        choose(self.live, self.copies, finite)


@torch.no_grad()
def choose(live: list[Tensor], copies: list[Tensor], keep: Bool[Tensor, ""]) -> None:
    """Leave the live tensors as they are, or make them their copies unless `keep`, without waiting
    for it.

    The copies are used up. In few launches: what runs on each tensor by itself is what an update on
    a GPU waits for. The arithmetic is on their bits, as whole numbers, so that what is not finite
    goes like everything else.
    """
    live_bits, copied_bits = (
        [tensor.view(BITS[tensor.dtype]) for tensor in tensors] for tensors in (live, copies)
    )
    torch._foreach_mul_(live_bits, keep.int())
    torch._foreach_mul_(copied_bits, (~keep).int())
    torch._foreach_add_(live_bits, copied_bits)


@torch.no_grad()
def drift(targets: list[Tensor], sources: list[Tensor], share: Float[Tensor, ""]) -> None:
    """`target += share (source - target)`, without waiting for the share, in few launches."""
    way = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(way, share)
    torch._foreach_add_(targets, way)


def step_if(optimizer: Any, finite: Bool[Tensor, ""]) -> None:
    """Step, unless the update is not finite; a fused optimizer reads the flag on its own device,
    others wait for it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    if finite.device.type == "cpu" or not inner.defaults.get("fused"):
        if finite:
            optimizer.step()
        return
    inner.found_inf, inner.grad_scale = (~finite).float(), torch.ones((), device=finite.device)
    optimizer.step()


@torch.no_grad()
def move_targets(
    targets: Sequence[Tensor], sources: Sequence[Tensor], smoothing: float, finite: Bool[Tensor, ""]
) -> None:
    """`target += smoothing (source - target)`, not at all unless `finite`."""
    targets = list(targets)
    sources = list(sources)
    if finite.device.type == "cpu":
        if finite:
            torch._foreach_lerp_(targets, sources, smoothing)
        return
    drift(targets, sources, smoothing * finite.float())
