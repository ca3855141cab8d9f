"""A network: a small one for every task, and nothing shared."""

from __future__ import annotations

from torch import Tensor

from softmod.networks.network import Network
from softmod.networks.stacked import StackedLinear


class PerTask(Network):
    """Two layers for each task; options are the keys of `actor` and `critic`.

    Args:
        in_dim: size of an input: the observation, for a critic with the action behind it.
        out_dim: size of an output: two numbers per action, or what the critic head asks for.
        num_tasks: the number of tasks.
        stack: the number of networks side by side: 1 for the actor, 2 for twin critics.
        width: of the hidden layer.
    """

    independent = True  # tasks share no weights

    def __init__(
        self, in_dim: int, out_dim: int, num_tasks: int, stack: int = 1, *, width: int = 32
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        # The leading axis of every parameter: all tasks of the first critic, then of the second.
        self.first = StackedLinear(stack * num_tasks, in_dim, width, "torch")
        self.last = StackedLinear(stack * num_tasks, width, out_dim, "torch")

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Return outputs `[stack, task, batch, out]` for inputs `[task, batch, in]`.

        Args:
            x: the inputs; some tasks may be missing.
            tasks: their indices; None: all tasks in order.
        """
        if tasks is not None:
            everyone = x.new_zeros(self.num_tasks, *x.shape[1:])
            return self(everyone.index_copy(0, tasks, x)).index_select(1, tasks)
        rows = x.repeat(self.stack, 1, 1)  # [stack * task, batch, in]
        return self.last(self.first(rows).relu()).unflatten(0, (self.stack, self.num_tasks))
