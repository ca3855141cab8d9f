"""Parameters, and the state of their optimizer, as views of a few flat buffers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

ALIGNED = 64  # elements; every tensor starts at a multiple, as matrix products on GPUs need
BLOCK = 1024  # elements of a program of a Triton kernel
# Options of Adam that change its steps, and the values that steps on flat buffers support.
PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False}


@dataclass(frozen=True)
class Options:
    """Options of Adam, with `decoupled` weight decay or none."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    @property
    def log_beta1(self) -> float:
        """Return the logarithm of the decay rate of the first moments."""
        return math.log(self.beta1) if self.beta1 else -math.inf

    @property
    def log_beta2(self) -> float:
        """Return the logarithm of the decay rate of the second moments."""
        return math.log(self.beta2) if self.beta2 else -math.inf


class Layout:
    """The places of tensors in a flat buffer.

    Args:
        shapes: their shapes.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = list(shapes)
        self.sizes = [shape.numel() for shape in shapes]
        self.offsets: list[int] = []
        self.total = 0
        for size in self.sizes:
            self.offsets.append(self.total)
            self.total += -(-size // ALIGNED) * ALIGNED

    def views(self, buffer: Float[Tensor, " number"]) -> list[Tensor]:
        """Return the tensors in a buffer."""
        places = zip(self.offsets, self.sizes, self.shapes, strict=True)
        return [buffer[offset : offset + size].view(shape) for offset, size, shape in places]

    @torch.no_grad()
    def buffer(self, tensors: Sequence[Tensor]) -> Float[Tensor, " number"]:
        """Return a buffer with the values of tensors, and zeros between them."""
        made = torch.zeros(self.total, dtype=tensors[0].dtype, device=tensors[0].device)
        torch._foreach_copy_(self.views(made), list(tensors))
        return made

    def move_into_buffer(self, parameters: Sequence[Tensor]) -> Float[Tensor, " number"]:
        """Make parameters views of a new buffer, with the same values; return the buffer."""
        made = self.buffer(parameters)
        for parameter, view in zip(parameters, self.views(made), strict=True):
            parameter.data = view
        return made

    def pack(
        self, tensors: Sequence[Tensor | None], zeros: Float[Tensor, " number"]
    ) -> Float[Tensor, " number"]:
        """Return tensors as one new flat tensor, zero in the place of None and between them.

        Args:
            tensors: tensors in fp32.
            zeros: a buffer of zeros.
        """
        parts: list[Tensor] = []
        ends = [*self.offsets[1:], self.total]
        places = zip(tensors, self.offsets, self.sizes, ends, strict=True)
        for tensor, offset, size, end in places:
            if tensor is None:
                parts.append(zeros[offset:end])
                continue
            parts.append(tensor.detach().reshape(-1))
            if end > offset + size:
                parts.append(zeros[offset + size : end])
        return torch.cat(parts)


class FlatAdam:
    """Parameters and the state of their Adam optimizer in flat buffers.

    The parameters and the optimizer's state become views, so names and shapes of the state remain.

    Args:
        optimizer: one that `supports` accepts, with initialized state.
        members: networks that share no weights; the leading axis of every parameter is a multiple.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, members: int) -> None:
        (group,) = optimizer.param_groups
        self.parameters: list[Tensor] = list(group["params"])
        self.members = members
        beta1, beta2 = group["betas"]
        self.options = Options(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=isinstance(optimizer, torch.optim.AdamW),
        )
        self.layout = Layout([parameter.shape for parameter in self.parameters])
        self.weights = self.layout.move_into_buffer(self.parameters)
        states = [optimizer.state[parameter] for parameter in self.parameters]
        self.first = self.layout.buffer([state["exp_avg"] for state in states])
        self.second = self.layout.buffer([state["exp_avg_sq"] for state in states])
        self.steps = torch.stack([state["step"].float() for state in states])
        for name, views in (
            ("exp_avg", self.layout.views(self.first)),
            ("exp_avg_sq", self.layout.views(self.second)),
            ("step", self.steps.unbind()),
        ):
            for state, view in zip(states, views, strict=True):
                state[name] = view
        # The state before a step: in fixed memory for kernels, in new memory for formulas.
        self.kept = [torch.empty_like(tensor) for tensor in self.state]
        self.clones: list[Tensor] = []
        self.zeros = torch.zeros_like(self.weights)
        self._use([True] * len(self.parameters))

    @property
    def state(self) -> list[Tensor]:
        """Return weights, first and second moments, and steps."""
        return [self.weights, self.first, self.second, self.steps]

    def gradient(self) -> Float[Tensor, " number"]:
        """Return the gradients of all parameters, in the layout of the weights."""
        gradients = [parameter.grad for parameter in self.parameters]
        used = [gradient is not None for gradient in gradients]
        if used != self.used:
            self._use(used)
        return self.layout.pack(gradients, self.zeros)

    @_disable_current_modes()
    def _use(self, used: list[bool]) -> None:
        """Prepare the tables for a step of those parameters that have a gradient.

        A recording or a trace must not repeat this.
        """
        self.used = used
        device = self.weights.device
        places = list(zip(self.layout.offsets, self.layout.sizes, strict=True))
        self.counted = torch.tensor(used, device=device).float()
        member = torch.zeros(self.layout.total, dtype=torch.int32)
        stepped = torch.zeros(self.layout.total, dtype=torch.bool)
        index: list[Int[Tensor, "stack size"]] = []
        rows: list[tuple[int, int, int, int]] = []
        for number, (offset, size) in enumerate(places):
            own = torch.arange(offset, offset + size).view(self.members, -1)
            index.append(own)
            member[own] = torch.arange(self.members, dtype=torch.int32)[:, None]
            stepped[own] = used[number]
            width = size // self.members
            if used[number]:
                rows += [
                    (offset + start, width, min(BLOCK, width - start), number)
                    for start in range(0, width, BLOCK)
                ]
        self.by_member = torch.cat(index, 1).to(device)
        self.member = member.to(device)
        self.stepped = None if all(used) else stepped.to(device)
        # Per block: its start, the distance to the same block of the next member, its length, and
        # the number of its parameter.
        self.blocks = torch.tensor(rows, dtype=torch.int32).to(device)


def triton_works(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device; their first launch needs a C compiler."""
    if find_spec("triton") is None:
        return False
    from softmod.kernels import triton_steps

    try:
        return bool(triton_steps.all_finite([torch.ones(1, device=device)]))
    except Exception as error:  # of the compiler or the driver, which may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("optimizer steps run without Triton's kernels: %s", reason)
        return False


def supports(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether steps on flat buffers are those of this optimizer."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    (group, *others) = optimizer.param_groups
    return (
        not others
        and bool(group["fused"])
        and all(group[name] == value for name, value in PLAIN.items())
        and not any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))
        and all(p.dtype is torch.float32 and p.is_contiguous() for p in group["params"])
    )
