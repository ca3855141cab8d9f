"""A value head of one's own: quantiles of the return, learned by quantile regression (QR-DQN,
Dabney et al. 2018).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from softmod.agent.value_heads import ValueHead


class Quantiles(ValueHead):
    """As many outputs as quantiles; the policy maximizes their mean, of the critic that expects
    less.
    """

    fractions: Tensor  # of the quantiles, the middles of equal parts of [0, 1]

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.outputs = count
        self.register_buffer("fractions", (torch.arange(count) + 0.5) / count, persistent=False)

    def value(self, outputs: Float[Tensor, "critic task batch out"]) -> Float[Tensor, "task batch"]:
        return outputs.float().mean(-1).amin(0)

    def target(
        self,
        reward: Float[Tensor, "task batch"],
        discount: Float[Tensor, "task batch"],
        next_outputs: Float[Tensor, "critic task batch out"],
        next_entropy: Float[Tensor, "task batch"],
    ) -> Float[Tensor, "task batch out"]:
        """Return the quantiles of the critic that expects less, moved by reward, discount and
        entropy.
        """
        outputs = next_outputs.float()
        least = outputs.mean(-1).argmin(0)[None, ..., None].expand(1, *outputs.shape[1:])
        quantiles = outputs.gather(0, least).squeeze(0)
        return reward[..., None] + discount[..., None] * (quantiles + next_entropy[..., None])

    def loss(
        self,
        outputs: Float[Tensor, "critic task batch out"],
        target: Float[Tensor, "task batch out"],
        weight: Float[Tensor, " task"],
    ) -> Float[Tensor, " critic"]:
        """Return the quantile Huber loss of every output against every target."""
        pairs = torch.broadcast_tensors(outputs.float()[..., :, None], target[..., None, :])
        below = (pairs[1] < pairs[0]).float()
        asymmetry = (self.fractions[:, None] - below).abs()
        per_task = (asymmetry * huber_loss(*pairs, reduction="none")).mean(-1).sum(-1).mean(-1)
        return (per_task * weight).mean(-1)
