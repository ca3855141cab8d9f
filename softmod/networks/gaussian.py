"""The tanh-Gaussian policy: a Gaussian whose samples are squashed into (-1, 1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from softmod import kernels
from softmod.networks.network import Network
from softmod.networks.normalization import Normalizer

# Difference 14 of docs/paper_and_code.md.
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
# log_std="tanh": within (-10, 2), initially about 0.
TANH_LOW = -10.0
TANH_HALF_RANGE = 6.0
TANH_SHIFT = 0.805


def split(
    outputs: Float[Tensor, "*batch two_actions"], log_std: str
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch action"]]:
    """Split a network's outputs into mean and log standard deviation.

    With "clamp", the log standard deviation is clamped to [-20, 2] (14). With "tanh", it is
    `-10 + 6 (tanh(x + 0.805) + 1)`: within (-10, 2), with a gradient everywhere, and about 0 at
    `x = 0`.
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

    `log(1 - tanh(u)^2)` is computed as `2 (log 2 - u - softplus(-2u))`, which is accurate where
    tanh saturates.
    """
    before = torch.addcmul(mean, log_std.exp(), noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    correction = 2.0 * (math.log(2.0) - before - softplus(-2.0 * before))
    return before.tanh(), (gaussian - correction).sum(-1)


class Actor(Network):
    """The policy: a network that maps normalized observations to a Gaussian.

    Args:
        network: a stack of one, with two outputs per action dimension.
        log_std: "clamp" or "tanh" (see `split`).
        normalize_obs: whether to normalize observations; the agent updates the statistics.
    """

    def __init__(self, network: Network, log_std: str, normalize_obs: bool) -> None:
        super().__init__(network.in_dim, network.out_dim, network.num_tasks, network.stack)
        self.network = network
        self.log_std = log_std
        self.normalizer = Normalizer(network.in_dim) if normalize_obs else None
        self.independent = network.independent

    def normalize(self, obs: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch obs"]:
        """Return normalized observations; unchanged without `normalize_obs`."""
        return obs if self.normalizer is None else self.normalizer(obs)

    def distribution(
        self, normalized: Float[Tensor, "task batch obs"], tasks: Int[Tensor, " task"] | None = None
    ) -> tuple[Float[Tensor, "task batch action"], Float[Tensor, "task batch action"]]:
        """Return mean and log standard deviation for normalized observations."""
        return split(self.network(normalized, tasks)[0], self.log_std)

    def sample(
        self,
        normalized: Float[Tensor, "task batch obs"],
        noise: Float[Tensor, "task batch action"],
        tasks: Int[Tensor, " task"] | None = None,
    ) -> tuple[Float[Tensor, "task batch action"], Float[Tensor, "task batch"]]:
        """Return actions and their log-probabilities for normalized observations (see `squash`)."""
        outputs: Tensor = self.network(normalized, tasks)
        if kernels.fits(outputs) and kernels.in_fp32(noise):
            return kernels.policy.sample(outputs.squeeze(0), noise, self.log_std == "tanh")
        return squash(*split(outputs[0], self.log_std), noise)

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        """Return the network's outputs for raw observations."""
        outputs: Tensor = self.network(self.normalize(x), tasks)
        return outputs

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        return self.network.routing(self.normalize(x), tasks)

    def draw(self, batch: int, generator: torch.Generator) -> None:
        self.network.draw(batch, generator)

    def random_words(self, batch: int) -> int:
        return self.network.random_words(batch)

    def draw_from(self, batch: int, words: Int[Tensor, " word"]) -> None:
        self.network.draw_from(batch, words)


def actions(
    actor: Actor,
    obs: Float[Tensor, "task copy obs"],
    tasks: Int[Tensor, " task"] | None = None,
    noise: Float[Tensor, "task copy action"] | None = None,
) -> Float[Tensor, "task copy action"]:
    """Return actions in [-1, 1] for some tasks (None: all, in order).

    Without noise, the actions are deterministic: tanh of the mean.
    """
    mean, log_std = actor.distribution(actor.normalize(obs), tasks)
    return mean.tanh() if noise is None else torch.addcmul(mean, log_std.exp(), noise).tanh()


class Policy:
    """A frozen actor with numpy inputs and outputs, for any of the tasks."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor.eval().requires_grad_(False)

    @torch.inference_mode()
    def act(
        self,
        obs: NDArray[np.float32],
        tasks: NDArray[np.int64] | None = None,
        noise: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Return actions `[task, copy, action]`; without noise, tanh of the mean.

        Args:
            obs: observations `[task, copy, obs]`.
            tasks: the task index of each row `[task]`; None: all tasks in order.
            noise: standard normal noise `[task, copy, action]`.
        """
        indices = None if tasks is None else torch.from_numpy(tasks)
        draws = None if noise is None else torch.from_numpy(noise)
        return actions(self.actor, torch.from_numpy(obs), indices, draws).numpy()

    @torch.inference_mode()
    def routing(
        self, obs: NDArray[np.float32], tasks: NDArray[np.int64] | None = None
    ) -> list[NDArray[Any]]:
        """Return the routing probabilities per layer, `[task, copy, target, source]`.

        The list is empty for networks without routing.
        """
        indices: Int[Tensor, " task"] | None = None if tasks is None else torch.from_numpy(tasks)
        return [route[0].numpy() for route in self.actor.routing(torch.from_numpy(obs), indices)]
