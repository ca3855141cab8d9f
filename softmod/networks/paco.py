"""PaCo (Sun et al.

2022): every weight of a task's network is a combination of shared parameter sets.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.networks.network import Network
from softmod.networks.norm import normalised
from softmod.networks.stacked import fill


class Composed(nn.Module):
    """A linear layer with weights `sum_k c_k(task) Theta_k`: sets `[stack, set, in, out]`, `[stack,
    set, 1, out]`.
    """

    def __init__(
        self, stack: int, num_sets: int, fan_in: int, fan_out: int, init: str, kind: str = "hidden"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, num_sets, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(stack, num_sets, 1, fan_out))
        fill(self.weight, self.bias, fan_in, fan_out, init, kind)

    def forward(
        self,
        x: Float[Tensor, "stack task batch fan_in"],
        composition: Float[Tensor, "stack task sets"],
    ) -> Float[Tensor, "stack task batch fan_out"]:
        weight, bias = (
            (composition @ p.flatten(2)).unflatten(-1, p.shape[2:])
            for p in (self.weight, self.bias)
        )  # (stack, task, in, out), (stack, task, 1, out)
        return x @ weight + bias


class PaCo(Network):
    """A multi-layer perceptron per task, composed of `num_sets` shared ones by a learned vector per
    task.

    The vectors start as U(+-sqrt(3 / num_sets)), so that composed weights vary as much as those of
    one set.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_sets: int,
        num_layers: int,
        width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.norm = norm
        bound = math.sqrt(3.0 / num_sets)
        self.composition = nn.Parameter(
            torch.empty(stack, num_tasks, num_sets).uniform_(-bound, bound)
        )
        widths = [in_dim] + [width] * num_layers
        self.hidden = nn.ModuleList(
            Composed(stack, num_sets, a, b, init) for a, b in pairwise(widths)
        )
        self.head = Composed(stack, num_sets, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        composition = self.composition if tasks is None else self.composition.index_select(1, tasks)
        features = x.expand(self.stack, *x.shape)
        for layer in self.hidden:
            features = normalised(layer(features, composition), self.norm, relu=True)
        return self.head(features, composition)
