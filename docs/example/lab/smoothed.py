"""An algorithm: MTSAC whose targets see noisy next observations (an option of its own)."""

from __future__ import annotations

from typing import Any

import torch

from softmod.agent.mtsac import MTSAC, Metrics
from softmod.agent.replay import Batch


class Smoothed(MTSAC):
    """MTSAC that adds noise to the next observations of a batch.

    Args:
        obs_noise: its standard deviation, in units of the observations as networks read them.
    """

    def __init__(self, *args: Any, obs_noise: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.obs_noise = obs_noise

    def _critic_loss(
        self, batch: Batch, next_noise: torch.Tensor, temperature: torch.Tensor,
        weight: torch.Tensor,
    ) -> Any:  # fmt: skip
        # Randomness comes in with the batch: an update is recorded once and repeated.
        shift = self.obs_noise * next_noise.mean(-1, keepdim=True)
        noisy = batch._replace(next_obs=batch.next_obs + shift)
        return super()._critic_loss(noisy, next_noise, temperature, weight)

    def _critic_metrics(
        self, losses: torch.Tensor, norms: torch.Tensor, finite: torch.Tensor
    ) -> Metrics:
        spread = (losses.max() - losses.min()).detach()
        return super()._critic_metrics(losses, norms, finite) | {"critic_spread": spread}
