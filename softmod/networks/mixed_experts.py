"""Mix-Expert, a baseline of Yang et al. (2020): a gate mixes the outputs of expert networks."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from softmod.networks.mixing import mix
from softmod.networks.mlp import Trunk
from softmod.networks.network import Network
from softmod.networks.stacked import StackedLinear


class MixedExperts(Network):
    """A mixture of `num_experts` networks like MT-SAC's, weighted by a gate on state and task.

    Args:
        num_experts: the number of expert networks; 4 in the paper.
        num_layers, width: hidden layers of each expert.
        gate_layers, gate_width: hidden layers of the gate, which ends in a softmax over experts.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_experts: int,
        num_layers: int,
        width: int,
        gate_layers: int,
        gate_width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.trunks = Trunk(in_dim, num_tasks, stack * num_experts, num_layers, width, init, norm)
        self.heads = StackedLinear(stack * num_experts, width, out_dim, init, kind="head")
        self.gate_trunk = Trunk(in_dim, num_tasks, stack, gate_layers, gate_width, init, norm)
        # The start values of a head make the gate nearly uniform.
        self.gate = StackedLinear(stack, gate_width, num_experts, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        heads = self.heads(self.trunks(x, tasks))
        outputs = heads.unflatten(0, (self.stack, -1))  # (stack, expert, rows, out)
        mixed = mix(outputs, self._gate(x, tasks)).squeeze(1)
        return mixed.unflatten(1, x.shape[:2])

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        return [self._gate(x, tasks).unflatten(1, x.shape[:2])]

    def _gate(self, x: Tensor, tasks: Tensor | None) -> Float[Tensor, "stack rows 1 expert"]:
        return self.gate(self.gate_trunk(x, tasks)).softmax(-1).unsqueeze(2)
