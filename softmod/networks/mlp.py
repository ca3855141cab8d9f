"""The network of MT-SAC: one multi-layer perceptron on the observation and the one-hot task."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import StackedLinear, TaskEmbedding, spread


class Trunk(nn.Module):
    """ReLU layers on the observation and the one-hot task (15).

    They map `[task, batch, in]` to `[stack, rows, width]`. The one-hot part of the first layer is a
    row per task, added to the product with the observation.
    """

    def __init__(
        self,
        in_dim: int,
        num_tasks: int,
        stack: int,
        num_layers: int,
        width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.first = StackedLinear(stack, in_dim, width, init)
        self.task = TaskEmbedding(stack, num_tasks, width, init, bias=False)
        self.hidden = nn.ModuleList(
            StackedLinear(stack, width, width, init) for _ in range(num_layers - 1)
        )

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None
    ) -> Float[Tensor, "stack rows width"]:
        rows = self.first(spread(x, self.first.weight.shape[0])).unflatten(1, x.shape[:2])
        rows = rows + self.task(tasks).unsqueeze(2)
        features = normalized(rows, self.norm, relu=True).flatten(1, 2)
        for layer in self.hidden:
            features = normalized(layer(features), self.norm, relu=True)
        return features


class MLP(Network):
    """A network that all tasks share; the task is a one-hot input (MT-SAC)."""

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
        self.trunk = Trunk(in_dim, num_tasks, stack, num_layers, width, init, norm)
        self.head = StackedLinear(stack, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        return self.head(self.trunk(x, tasks)).unflatten(1, x.shape[:2])
