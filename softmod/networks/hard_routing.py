"""Hard routing (after Rosenbaum et al. 2018): each module selects one source module."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmod.counter import gumbel_table, gumbels
from softmod.networks.soft_modular import Router, SoftModular


class HardRouter(Router):
    """A router with one-hot weights: each target reads one source.

    In updates, the source is sampled by straight-through Gumbel-softmax (Jang et al. 2017) with
    noise from `draw`. Otherwise it is the most probable source.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Per layer [stack, task, batch, target, source]; not part of a run's state.
        self.noise: list[Tensor] = []
        self.table: Tensor | None = None  # of Gumbel quantiles, for `draw_from`

    def weigh(
        self,
        layer: int,
        logits: Float[Tensor, "stack rows target source"],
        tasks: Int[Tensor, " task"] | None,
    ) -> Float[Tensor, "stack rows target source"]:
        if not (self.training and self.noise):
            return one_hot(logits)
        noise = self.noise[layer] if tasks is None else self.noise[layer].index_select(1, tasks)
        soft = (logits + noise.flatten(1, 2)).softmax(-1)
        return one_hot(soft) + (soft - soft.detach())

    def draw(self, stack: int, num_tasks: int, batch: int, generator: torch.Generator) -> None:
        """Draw standard Gumbel noise for all layers, in place as long as the sizes are the same."""
        self._allocate(self.shapes(stack, num_tasks, batch))
        for noise in self.noise:
            noise.exponential_(generator=generator).log_().neg_()

    def draw_from(
        self, stack: int, num_tasks: int, batch: int, words: Int[Tensor, " word"]
    ) -> None:
        """Draw the noise from random words, in place as long as the sizes are the same."""
        self._allocate(self.shapes(stack, num_tasks, batch))
        if self.table is None or self.table.device != words.device:
            self.table = gumbel_table(words.device)
        sizes = [noise.numel() for noise in self.noise]
        for noise, own in zip(self.noise, words.split(sizes), strict=True):
            noise.copy_(gumbels(own, self.table).view_as(noise))

    def shapes(self, stack: int, num_tasks: int, batch: int) -> list[tuple[int, ...]]:
        """Return the shape of each layer's noise."""
        sources = self.num_modules
        widths = [output.get_parameter("weight").shape[-1] for output in self.output]
        return [(stack, num_tasks, batch, width // sources, sources) for width in widths]

    def _allocate(self, shapes: list[tuple[int, ...]]) -> None:
        if [tuple(noise.shape) for noise in self.noise] != shapes:
            like = self.output[0].get_parameter("weight")
            self.noise = [like.new_empty(shape) for shape in shapes]


class HardRouting(SoftModular):
    """Soft modularization with a `HardRouter`; the options are those of `SoftModular`."""

    router_class = HardRouter
    router: HardRouter

    @torch.no_grad()
    def draw(self, batch: int, generator: torch.Generator) -> None:
        self.router.draw(self.stack, self.num_tasks, batch, generator)

    def random_words(self, batch: int) -> int:
        return sum(map(math.prod, self.router.shapes(self.stack, self.num_tasks, batch)))

    @torch.no_grad()
    def draw_from(self, batch: int, words: Int[Tensor, " word"]) -> None:
        self.router.draw_from(self.stack, self.num_tasks, batch, words)


def one_hot(scores: Float[Tensor, "*batch source"]) -> Float[Tensor, "*batch source"]:
    """Return 1 for the largest score (the first of equals) and 0 for the others."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
