"""Running statistics of observations, returns and success, as part of an agent's state.

They are module buffers, so checkpoints contain them. They change only between rounds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod import kernels
from softmod.spec import Episode, Floats


class RunningMoments(nn.Module):
    """Mean and variance of all observations, pooled over tasks (Chan et al. 1979)."""

    count: Tensor
    mean: Tensor
    squares: Tensor  # the sum of squared distances from the mean

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(obs_dim, dtype=torch.float64))

    @torch.no_grad()
    def add(self, obs: Floats) -> None:
        """Add observations `[..., obs]`."""
        rows = obs.reshape(-1, obs.shape[-1]).astype(np.float64)
        mean = rows.mean(0)
        squares = np.square(rows - mean).sum(0)
        count = self.count + len(rows)
        delta = torch.from_numpy(mean).to(self.mean.device) - self.mean
        share = len(rows) / count
        self.squares.add_(
            torch.from_numpy(squares).to(delta.device) + delta.square() * self.count * share
        )
        self.mean.add_(delta * share)
        self.count.copy_(count)

    @property
    def variance(self) -> Float[Tensor, " obs"]:
        """Return the variance `[obs]`; zero before the first observation."""
        return self.squares / self.count.clamp(min=1.0)


class ReturnScale(nn.Module):
    """Reward scaling that gives the values of all tasks the same size (BRC, Nauman et al. 2025).

    A task's rewards are divided by `(G + alpha_i |H| / (2 (1 - gamma))) / 10`. `G` is the largest
    absolute discounted return from any step of a finished training episode; after the last step,
    the episode's mean reward is assumed to continue forever. `H` is the target entropy. Scaled
    returns so far lie within +-10; the entropy terms of the values are not included.

    Args:
        num_tasks: the number of tasks.
        discount: gamma.
        target_entropy: H.
    """

    largest: Tensor  # G, per task; 0 before the first finished episode

    def __init__(self, num_tasks: int, discount: float, target_entropy: float) -> None:
        super().__init__()
        self.discount = discount
        self.target_entropy = target_entropy
        self.register_buffer("largest", torch.zeros(num_tasks))

    @torch.no_grad()
    def add(self, episodes: Iterable[Episode]) -> None:
        """Add finished training episodes."""
        found = np.zeros(len(self.largest), np.float32)
        for episode in episodes:
            found[episode.task] = max(
                found[episode.task], largest_return(episode.rewards, self.discount)
            )
        self.largest.copy_(
            torch.maximum(self.largest, torch.from_numpy(found).to(self.largest.device))
        )

    def forward(
        self, reward: Float[Tensor, "task batch"], temperature: Float[Tensor, " task"]
    ) -> Float[Tensor, "task batch"]:
        """Return scaled rewards; unchanged for tasks without a finished episode."""
        per_temperature = abs(self.target_entropy) / (2.0 * (1.0 - self.discount))
        if kernels.in_fp32(reward, temperature, self.largest):
            return kernels.policy.scale_rewards(
                reward, temperature, self.largest, per_temperature, VALUES
            )
        entropy = temperature * per_temperature
        divisor = torch.where(self.largest > 0, (self.largest + entropy) / VALUES, 1.0)
        return reward / divisor[:, None]


class SuccessRates(nn.Module):
    """Exponential moving averages of training success per task, over about ten episodes.

    Args:
        num_tasks: the number of tasks.
    """

    rates: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("rates", torch.zeros(num_tasks))

    @torch.no_grad()
    def add(self, episodes: Iterable[Episode]) -> None:
        """Add finished training episodes."""
        rates = self.rates.cpu()
        for episode in episodes:
            rates[episode.task] += NEWEST_EPISODE * (float(episode.success) - rates[episode.task])
        self.rates.copy_(rates)


NEWEST_EPISODE = 0.1  # weight of the newest episode in a task's success rate
VALUES = 10.0  # size of values after scaling


def largest_return(rewards: Iterable[float], discount: float) -> float:
    """Return the largest absolute discounted return from any step of an episode.

    After the last step, the mean reward continues forever.
    """
    values = np.asarray(tuple(rewards), np.float64)
    following = values.mean() / (1.0 - discount)
    largest = 0.0
    for reward in values[::-1]:
        following = reward + discount * following
        largest = max(largest, abs(following))
    return float(largest)
