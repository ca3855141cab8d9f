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

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # 14


def split(
    outputs: Float[Tensor, "*batch two_actions"],
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch action"]]:
    """A network's outputs as mean and clamped log standard deviation."""
    mean, log_std = outputs.chunk(2, -1)
    return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def squash(
    mean: Float[Tensor, "*batch action"], log_std: Float[Tensor, "*batch action"], noise: Float[Tensor, "*batch action"]
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, " *batch"]]:
    """The action `tanh(mean + std * noise)` and its log-probability.

    `log(1 - tanh(u)^2)` is taken as `2 (log 2 - u - softplus(-2u))`, which stays exact where tanh saturates.
    """
    before = torch.addcmul(mean, log_std.exp(), noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    correction = 2.0 * (math.log(2.0) - before - softplus(-2.0 * before))
    return before.tanh(), (gaussian - correction).sum(-1)


def actions(
    actor: Network,
    obs: Float[Tensor, "task copy obs"],
    tasks: Int[Tensor, " task"] | None = None,
    noise: Float[Tensor, "task copy action"] | None = None,
) -> Float[Tensor, "task copy action"]:
    """What the policy does in some of the tasks (None: all of them in order); without noise, tanh of the mean."""
    mean, log_std = split(actor(obs, tasks)[0])
    return mean.tanh() if noise is None else torch.addcmul(mean, log_std.exp(), noise).tanh()


class Policy:
    """An actor that only acts: frozen weights, numpy in and out, for any of the tasks."""

    def __init__(self, actor: Network) -> None:
        self.actor = actor.eval().requires_grad_(False)

    @torch.inference_mode()
    def act(
        self,
        obs: NDArray[np.float32],
        tasks: NDArray[np.int64] | None = None,
        noise: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Actions `[task, copy, action]` for observations `[task, copy, obs]`; without noise, tanh of the mean.

        `tasks [task]` names the rows' tasks by index; None stands for all of them in order.
        """
        indices, draws = (None if array is None else torch.from_numpy(array) for array in (tasks, noise))
        return actions(self.actor, torch.from_numpy(obs), indices, draws).numpy()

    @torch.inference_mode()
    def routing(self, obs: NDArray[np.float32], tasks: NDArray[np.int64] | None = None) -> list[NDArray[Any]]:
        """Routing probabilities per layer, `[task, copy, target, source]`; empty for networks that do not route."""
        indices: Int[Tensor, " task"] | None = None if tasks is None else torch.from_numpy(tasks)
        return [route[0].numpy() for route in self.actor.routing(torch.from_numpy(obs), indices)]
