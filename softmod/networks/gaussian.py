"""The tanh-Gaussian policy: a Gaussian whose sample is squashed into (-1, 1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from softmod.networks.network import Network
from softmod.networks.normalization import Normalizer

# 14
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
# log std starts at about 0, within (-10, 2)
TANH_LOW = -10.0
TANH_HALF_RANGE = 6.0
TANH_SHIFT = 0.805


def split(
    outputs: Float[Tensor, "*batch two_actions"], log_std: str
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch action"]]:
    """Return a network's outputs as mean and log standard deviation.

    The latter is clamped to [-20, 2] (14), or, with `tanh`, `-10 + 6 (tanh(x + 0.805) + 1)`: within
    (-10, 2), with a gradient everywhere, and about 0 where the output is 0.
    """
    mean, raw = outputs.chunk(2, -1)
    if log_std == "tanh":
        return mean, TANH_LOW + TANH_HALF_RANGE * ((raw + TANH_SHIFT).tanh() + 1.0)
    return mean, raw.clamp(LOG_STD_MIN, LOG_STD_MAX)


def squash(
    mean: Float[Tensor, "*batch action"],
    log_std: Float[Tensor, "*batch action"],
    noise: Float[Tensor, "*batch action"],
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, " *batch"]]:
    """Return the action `tanh(mean + std * noise)` and its log-probability.

    `log(1 - tanh(u)^2)` is taken as `2 (log 2 - u - softplus(-2u))`, which stays exact where tanh
    saturates.
    """
    before = torch.addcmul(mean, log_std.exp(), noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    correction = 2.0 * (math.log(2.0) - before - softplus(-2.0 * before))
    return before.tanh(), (gaussian - correction).sum(-1)


class Actor(Network):
    """A network as the policy: observations are normalised before it, its outputs read as a
    Gaussian.

    Args:
        network: with one member and two outputs per action.
        log_std: "clamp" or "tanh" (see `split`).
        normalize_obs: whether observations are normalised, by statistics that the agent keeps up to
            date.
    """

    def __init__(self, network: Network, log_std: str, normalize_obs: bool) -> None:
        super().__init__(network.in_dim, network.out_dim, network.num_tasks, network.stack)
        self.network = network
        self.log_std = log_std
        self.normalizer = Normalizer(network.in_dim) if normalize_obs else None
        self.independent = network.independent

    def normalize(self, obs: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch obs"]:
        """Return observations as the networks read them."""
        return obs if self.normalizer is None else self.normalizer(obs)

    def distribution(
        self, normalized: Float[Tensor, "task batch obs"], tasks: Int[Tensor, " task"] | None = None
    ) -> tuple[Float[Tensor, "task batch action"], Float[Tensor, "task batch action"]]:
        """Return mean and log standard deviation for normalised observations."""
        return split(self.network(normalized, tasks)[0], self.log_std)

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        """Return the network's outputs for observations as they are."""
        outputs: Tensor = self.network(self.normalize(x), tasks)
        return outputs

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        return self.network.routing(self.normalize(x), tasks)

    def draw(self, batch: int, generator: torch.Generator) -> None:
        self.network.draw(batch, generator)


def actions(
    actor: Actor,
    obs: Float[Tensor, "task copy obs"],
    tasks: Int[Tensor, " task"] | None = None,
    noise: Float[Tensor, "task copy action"] | None = None,
) -> Float[Tensor, "task copy action"]:
    """Return what the policy does in some of the tasks (None: all, in order); without noise, tanh
    of the mean.
    """
    mean, log_std = actor.distribution(actor.normalize(obs), tasks)
    return mean.tanh() if noise is None else torch.addcmul(mean, log_std.exp(), noise).tanh()


class Policy:
    """An actor that only acts: frozen weights, numpy in and out, for any of the tasks."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor.eval().requires_grad_(False)

    @torch.inference_mode()
    def act(
        self,
        obs: NDArray[np.float32],
        tasks: NDArray[np.int64] | None = None,
        noise: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Return actions `[task, copy, action]` for observations `[task, copy, obs]`; without
        noise, tanh of the mean.

        `tasks [task]` names the rows' tasks by index; None stands for all of them in order.
        """
        indices, draws = (
            None if array is None else torch.from_numpy(array) for array in (tasks, noise)
        )
        return actions(self.actor, torch.from_numpy(obs), indices, draws).numpy()

    @torch.inference_mode()
    def routing(
        self, obs: NDArray[np.float32], tasks: NDArray[np.int64] | None = None
    ) -> list[NDArray[Any]]:
        """Routing probabilities per layer, `[task, copy, target, source]`; empty for networks that
        do not route.
        """
        indices: Int[Tensor, " task"] | None = None if tasks is None else torch.from_numpy(tasks)
        return [route[0].numpy() for route in self.actor.routing(torch.from_numpy(obs), indices)]
