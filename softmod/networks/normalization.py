"""Observations on one scale: the statistics that networks read, kept with the policy's weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

LEAST_STD = 0.02  # of an observation's number; what hardly moves is not blown up
LIMIT = 5.0  # standard deviations that a network gets to see


class Normalizer(nn.Module):
    """Shift and scale observations to mean 0 and standard deviation 1, clipped to +-5.

    Mean and scale are buffers: they travel with the weights to workers, evaluations and
    checkpoints.
    """

    mean: Tensor
    scale: Tensor  # 1 / standard deviation

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))

    def forward(self, obs: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch obs"]:
        return ((obs - self.mean) * self.scale).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def set(self, mean: Float[Tensor, " obs"], variance: Float[Tensor, " obs"]) -> None:
        """Use these statistics from now on, in the same memory."""
        self.mean.copy_(mean)
        self.scale.copy_(variance.clamp(min=0.0).sqrt().clamp(min=LEAST_STD).reciprocal())
