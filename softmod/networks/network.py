"""The base class of all networks: tasks are an axis, an ensemble is the leading axis."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Network(nn.Module, abc.ABC):
    """A stack of networks for several tasks at once.

    `forward(x, tasks)` maps inputs `[task, batch, in]` and task indices `[task]` (None: all tasks
    in order) to `[stack, task, batch, out]`. Members of a stack share only their input.
    """

    independent = False  # True if tasks share no weights: each task is then an agent of its own

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
        """Return the routing probabilities per layer; empty for networks without routing."""
        return []

    @property
    def members(self) -> int:
        """Return the number of networks that share no weights.

        The leading axis of every parameter is a multiple of it, members outermost.
        """
        return self.stack * (self.num_tasks if self.independent else 1)

    def draw(self, batch: int, generator: torch.Generator) -> None:
        """Draw random numbers inside the network for an update on `[task, batch, in]`.

        No-op for deterministic networks.
        """

    def random_words(self, batch: int) -> int:
        """Return the number of random words that `draw_from` uses for `[task, batch, in]`."""
        return 0

    def draw_from(self, batch: int, words: Int[Tensor, " word"]) -> None:
        """Draw what `draw` does, in place, from random 32-bit words (see `softmod.counter`).

        A network that overrides `draw` but not this cannot draw within a CUDA graph.
        """

    def num_parameters(self) -> int:
        """Return the number of parameters of all members."""
        return sum(parameter.numel() for parameter in self.parameters())
