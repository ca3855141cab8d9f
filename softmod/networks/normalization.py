"""Normalization of observations, with statistics that are part of the policy's weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod import kernels

LEAST_STD = 0.02  # a smaller standard deviation counts as this, so that noise is not amplified
LIMIT = 5.0  # normalized observations are clipped to +-LIMIT


class Normalizer(nn.Module):
    """A layer that normalizes observations to mean 0 and standard deviation 1, clipped to +-5.

    Mean and scale are buffers, so they are sent to workers and saved together with the weights.
    """

    mean: Tensor
    scale: Tensor  # 1 / standard deviation

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))

    def forward(self, obs: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch obs"]:
        if kernels.in_fp32(obs, self.mean):
            return kernels.policy.normalize_obs(obs, self.mean, self.scale, LIMIT)
        return ((obs - self.mean) * self.scale).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def set(self, mean: Float[Tensor, " obs"], variance: Float[Tensor, " obs"]) -> None:
        """Set the statistics in place."""
        self.mean.copy_(mean)
        self.scale.copy_(variance.clamp(min=0.0).sqrt().clamp(min=LEAST_STD).reciprocal())
