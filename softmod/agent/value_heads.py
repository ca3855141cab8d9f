"""Value heads: what a critic's outputs mean, and how they learn.

A head is handed the critics' outputs and is all that knows what they stand for. Another kind of
distribution is another class with the same four members: `outputs`, `value`, `target`, `loss`.
Targets are made without gradients; rewards arrive as they are to be learned, scaled if that is
asked for; a loss may be asked for some of the tasks only.
"""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod.agent import losses


class ValueHead(nn.Module, abc.ABC):
    """From a critic's outputs `[critic, task, batch, out]` to values, targets and losses."""

    outputs: int  # of a critic

    @abc.abstractmethod
    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        """Return the value that the policy maximises."""

    @abc.abstractmethod
    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch *target"]:
        """Return what the critics learn, from the target critics' outputs at the next state and
        action.

        `next_entropy` is `-alpha_i log pi(a'|s')`, which is part of the next state's value.
        """

    @abc.abstractmethod
    def loss(
        self,
        outputs: Float[Tensor, "critic task batch out"],
        target: Float[Tensor, "task batch *target"],
        weight: Float[Tensor, " task"],
    ) -> Float[Tensor, " critic"]:
        """Return each critic's loss, tasks weighted by `weight` (Eq. 10)."""


class Squared(ValueHead):
    """One output, the value; squared error against the minimum of the target critics (Haarnoja et
    al. 2018).
    """

    outputs = 1

    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        return outputs.squeeze(-1).amin(0)

    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch"]:
        return losses.critic_target(reward, discount, next_outputs.squeeze(-1), next_entropy)

    def loss(
        self,
        outputs: Float[Tensor, "critic task batch out"],
        target: Float[Tensor, "task batch"],
        weight: Float[Tensor, " task"],
    ) -> Float[Tensor, " critic"]:
        return losses.critic_loss(outputs.squeeze(-1), target, weight)


class Categorical(ValueHead):
    """A distribution over `atoms` values from `low` to `high`, learned by cross-entropy (C51,
    Bellemare et al. 2017).

    The target critics' distributions are averaged, shifted and scaled by reward, discount and
    entropy, and projected onto the atoms; the policy maximises the mean of the critics' expected
    values (BRC, Nauman et al. 2025).

    Args:
        atoms: how many values.
        low: the smallest value; what lies below it is clipped.
        high: the largest value; what lies above it is clipped.

    Raises:
        ValueError: fewer than two atoms, or `low` is not below `high`.
    """

    support: Tensor

    def __init__(self, atoms: int, low: float, high: float) -> None:
        super().__init__()
        if atoms < 2 or low >= high:
            raise ValueError(
                f"at least two atoms, and low < high: not {atoms} in [{low:g}, {high:g}]"
            )
        self.outputs = atoms
        self.register_buffer("support", torch.linspace(low, high, atoms), persistent=False)

    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        return (outputs.float().softmax(-1) * self.support).sum(-1).mean(0)

    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch atom"]:
        probabilities = next_outputs.float().softmax(-1).mean(0)
        first = reward + discount * next_entropy
        values = torch.addcmul(first[..., None], discount[..., None], self.support)
        return losses.project(values, probabilities, self.support)

    def loss(
        self,
        outputs: Float[Tensor, "critic task batch out"],
        target: Float[Tensor, "task batch atom"],
        weight: Float[Tensor, " task"],
    ) -> Float[Tensor, " critic"]:
        return losses.cross_entropy(outputs.float(), target, weight)
