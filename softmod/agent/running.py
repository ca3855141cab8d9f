"""What an agent remembers of all its experience: statistics of observations and returns, as part of
its state.

They are buffers of modules, so checkpoints and exact resume know them; they change between rounds
only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod.spec import Episode, Floats


class RunningMoments(nn.Module):
    """Mean and variance of observations over all experience, pooled over tasks (Chan et al.

    1979).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor  # summed squared distances from the mean

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
        apart = torch.from_numpy(mean).to(self.mean.device) - self.mean
        share = len(rows) / count
        self.squares.add_(
            torch.from_numpy(squares).to(apart.device) + apart.square() * self.count * share
        )
        self.mean.add_(apart * share)
        self.count.copy_(count)

    @property
    def variance(self) -> Float[Tensor, " obs"]:
        """The variance so far."""
        return self.squares / self.count.clamp(min=1.0)


class ReturnScale(nn.Module):
    """Scale rewards so that every task's values have the same size (BRC, Nauman et al. 2025).

    A task's rewards are divided by `(G + alpha_i |H| / (2 (1 - gamma))) / 10`, where `G` is the
    largest absolute discounted return from any step of a whole training episode so far, and H the
    target entropy. Returns seen so far then lie within +-10; the entropy's part of the values comes
    on top. An episode's return beyond its last step is taken as its mean reward for ever.

    Args:
        num_tasks: whose returns are kept.
        discount: gamma.
        target_entropy: H.
    """

    largest: Tensor  # G, per task; 0 before the first whole episode

    def __init__(self, num_tasks: int, discount: float, target_entropy: float) -> None:
        super().__init__()
        self.discount = discount
        self.target_entropy = target_entropy
        self.register_buffer("largest", torch.zeros(num_tasks))

    @torch.no_grad()
    def add(self, episodes: Iterable[Episode]) -> None:
        """Add training episodes that ended."""
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
        """Return the scaled rewards; unchanged for tasks without a whole episode yet."""
        entropy = temperature * (abs(self.target_entropy) / (2.0 * (1.0 - self.discount)))
        divisor = torch.where(self.largest > 0, (self.largest + entropy) / VALUES, 1.0)
        return reward / divisor[:, None]


class SuccessRates(nn.Module):
    """Keep, per task, a running mean of whether training episodes reached success; about the last
    ten count.

    Args:
        num_tasks: whose episodes they are.
    """

    rates: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("rates", torch.zeros(num_tasks))

    @torch.no_grad()
    def add(self, episodes: Iterable[Episode]) -> None:
        """Add training episodes that ended."""
        rates = self.rates.cpu()
        for episode in episodes:
            rates[episode.task] += NEWEST_EPISODE * (float(episode.success) - rates[episode.task])
        self.rates.copy_(rates)


NEWEST_EPISODE = 0.1  # its share in a task's success rate
VALUES = 10.0  # the size of values after scaling


def largest_return(rewards: Iterable[float], discount: float) -> float:
    """Return the largest absolute discounted return from any step of an episode, its mean reward
    going on for ever.
    """
    values = np.asarray(tuple(rewards), np.float64)
    following = values.mean() / (1.0 - discount)
    largest = 0.0
    for reward in values[::-1]:
        following = reward + discount * following
        largest = max(largest, abs(following))
    return float(largest)
