"""PaCo (Sun et al. 2022): each task's weights are a linear combination of shared parameter sets."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.networks import products
from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import fill


class Composed(nn.Module):
    """A linear layer with weights `sum_k c_k(task) Theta_k`.

    The parameter sets are `[stack, set, in, out]` and, for the bias, `[stack, set, 1, out]`.
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
        weight = _compose(composition, self.weight)  # (stack, task, in, out)
        bias = _compose(composition, self.bias)  # (stack, task, 1, out)
        return products.product(x, weight, products.copy_of(weight)) + bias


def _compose(composition: Tensor, sets: Tensor) -> Tensor:
    """Return each task's combination `[stack, task, ...]` of parameter sets `[stack, set, ...]`."""
    return (composition @ sets.flatten(2)).unflatten(-1, sets.shape[2:])


class PaCo(Network):
    """A multi-layer perceptron per task, composed of `num_sets` shared parameter sets.

    Each task has a learned composition vector. It starts as U(+-sqrt(3 / num_sets)), so that
    composed weights have the variance of a single set.
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
            features = normalized(layer(features, composition), self.norm, relu=True)
        return self.head(features, composition)
