"""Value heads: the interpretation of a critic's outputs, with its targets and losses.

Only the head depends on the meaning of the outputs. A new kind of distribution is a new class with
the members `outputs`, `value`, `target` and `loss`. Targets are computed without gradients. Rewards
are already scaled, if reward scaling is on. A loss may be computed for a subset of the tasks.
"""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod import kernels
from softmod.agent import losses


class ValueHead(nn.Module, abc.ABC):
    """A map from critics' outputs `[critic, task, batch, out]` to values, targets and losses."""

    outputs: int  # outputs per critic

    @abc.abstractmethod
    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        """Return the value that the policy maximizes."""

    @abc.abstractmethod
    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch *target"]:
        """Return the critics' target, from the target critics' outputs at the next state.

        `next_entropy` is `-alpha_i log pi(a'|s')`, which is part of the next state's value.
        """

    @abc.abstractmethod
    def loss(
        self,
        outputs: Float[Tensor, "critic task batch out"],
        target: Float[Tensor, "task batch *target"],
        weight: Float[Tensor, " task"],
    ) -> Float[Tensor, " critic"]:
        """Return each critic's loss, weighted over tasks (Eq. 10)."""


class Squared(ValueHead):
    """A scalar value, learned by squared error.

    The target uses the minimum of the target critics (Haarnoja et al. 2018).
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
    """A categorical distribution over values, learned by cross-entropy (Bellemare et al. 2017).

    The target critics' distributions are averaged, shifted and scaled by reward, discount and
    entropy, and projected onto the atoms. The policy maximizes the mean of the critics' expected
    values (BRC, Nauman et al. 2025).

    Args:
        atoms: the number of values, evenly spaced.
        low: the smallest value; smaller targets are clipped.
        high: the largest value; larger targets are clipped.

    Raises:
        ValueError: fewer than two atoms, or `low >= high`.
    """

    support: Tensor

    def __init__(self, atoms: int, low: float, high: float) -> None:
        super().__init__()
        if atoms < 2 or low >= high:
            raise ValueError(
                f"needs at least two atoms and low < high, got {atoms} in [{low:g}, {high:g}]"
            )
        self.outputs = atoms
        self.register_buffer("support", torch.linspace(low, high, atoms), persistent=False)

    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        if kernels.fits(outputs) and kernels.in_fp32(self.support):
            return kernels.heads.expected_value(outputs, self.support)
        return (outputs.float().softmax(-1) * self.support).sum(-1).mean(0)

    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch atom"]:
        if kernels.fits(next_outputs) and kernels.in_fp32(reward, discount, next_entropy):
            return kernels.heads.categorical_target(
                reward, discount, next_outputs, next_entropy, self.support
            )
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
        if kernels.fits(outputs) and kernels.in_fp32(target, weight):
            return kernels.heads.cross_entropy(outputs, target, weight)
        return losses.cross_entropy(outputs.float(), target, weight)
