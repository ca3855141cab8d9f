"""FiLM (Perez et al. 2018): a task embedding scales and shifts every hidden layer."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import StackedLinear, TaskEmbedding, spread


class FiLM(Network):
    """A shared network with hidden layers `relu((1 + gamma(z)) * (W x + b) + beta(z))`.

    A linear layer on the task embedding `z` yields all gammas and betas, which start near 0. With
    `norm="layer"`, `W x + b` is normalized first.

    Args:
        num_layers, width: hidden layers of the shared network.
        embedding_width: the width of the task embedding.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_layers: int,
        width: int,
        embedding_width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.norm = norm
        widths = [in_dim] + [width] * num_layers
        self.hidden = nn.ModuleList(StackedLinear(stack, a, b, init) for a, b in pairwise(widths))
        self.task = TaskEmbedding(stack, num_tasks, embedding_width, init)
        self.modulation = StackedLinear(
            stack, embedding_width, 2 * num_layers * width, init, kind="head"
        )
        self.head = StackedLinear(stack, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        both = self.modulation(relu(self.task(tasks))).unflatten(-1, (len(self.hidden), 2, 1, -1))
        features = spread(x, self.stack)
        for layer, modulation in zip(self.hidden, both.unbind(2), strict=True):
            gamma, beta = modulation.unbind(2)  # (stack, task, 1, width)
            by_task = normalized(layer(features), self.norm).unflatten(1, x.shape[:2])
            features = relu(by_task * (1.0 + gamma) + beta).flatten(1, 2)
        return self.head(features).unflatten(1, x.shape[:2])
