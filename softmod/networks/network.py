"""What every network of this package is: tasks are an axis, an ensemble is a leading one."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Network(nn.Module, abc.ABC):
    """From features of states (and actions) to outputs, for several tasks at once, `stack` times
    side by side.

    `forward(x, tasks)` takes `x [task, batch, in]` and the tasks' indices `[task]` (None: all of
    them, in order) and gives `[stack, task, batch, out]`. Members of a stack share the input and
    nothing else.
    """

    independent = False  # whether tasks share no weight at all: each is then an agent of its own

    def __init__(self, in_dim: int, out_dim: int, num_tasks: int, stack: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.num_tasks = num_tasks
        self.stack = stack

    @abc.abstractmethod
    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        """Return the outputs for rows of `tasks` (None: of all, in order)."""

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        """The routing probabilities per layer; empty for networks that do not route."""
        return []

    @property
    def members(self) -> int:
        """Return how many networks share nothing: parameters' leading axes begin with them."""
        return self.stack * (self.num_tasks if self.independent else 1)

    def draw(self, batch: int, generator: torch.Generator) -> None:
        """Draw what is random in the network itself, for the next update on `[task, batch, in]`;
        here nothing is.
        """

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
