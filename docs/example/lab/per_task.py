"""A network: a small one for every task, and nothing shared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmod.networks.network import Network
from softmod.networks.stacked import StackedLinear


class PerTask(Network):
    """Two layers for each task.

    Each member of a stack has its own; options are the keys of `actor` and `critic`.
    """

    def __init__(
        self, in_dim: int, out_dim: int, num_tasks: int, stack: int = 1, *, width: int = 32
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    StackedLinear(num_tasks, in_dim, width, "torch"),
                    StackedLinear(num_tasks, width, out_dim, "torch"),
                ]
            )
            for _ in range(stack)
        )

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        """`[task, batch, in]` to `[stack, task, batch, out]`; `tasks` are the rows' indices, None
        for all in order.
        """
        if tasks is not None:
            everyone = x.new_zeros(self.num_tasks, *x.shape[1:])
            return self(everyone.index_copy(0, tasks, x)).index_select(1, tasks)
        return torch.stack([last(first(x).relu()) for first, last in self.layers])
