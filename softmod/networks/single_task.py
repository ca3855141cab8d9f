"""The network of single-task SAC: tasks share no weights, every weight has a task axis."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import PerTaskLinear


class SingleTask(Network):
    """A multi-layer perceptron per task: independent agents, trained in one run."""

    independent = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_layers: int,
        width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.norm = norm
        widths = [in_dim] + [width] * num_layers
        self.hidden = nn.ModuleList(
            PerTaskLinear(stack, num_tasks, a, b, init) for a, b in pairwise(widths)
        )
        self.head = PerTaskLinear(stack, num_tasks, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        features = x.expand(self.stack, *x.shape)
        for layer in self.hidden:
            features = normalized(layer(features, tasks), self.norm, relu=True)
        return self.head(features, tasks)
