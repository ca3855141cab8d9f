"""The network of MT-MH-SAC: a shared trunk and an output head per task."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from softmod.networks.mlp import Trunk
from softmod.networks.network import Network
from softmod.networks.stacked import PerTaskLinear


class MultiHead(Network):
    """A shared trunk with a head per task, weights `[stack * task, width, out]` (MT-MH-SAC)."""

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
        self.heads = PerTaskLinear(stack, num_tasks, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        return self.heads(self.trunk(x, tasks).unflatten(1, x.shape[:2]), tasks)
