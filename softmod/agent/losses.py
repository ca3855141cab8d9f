"""The losses of multi-task SAC: pure functions; equation numbers are those of Yang et al. (NeurIPS 2020).

Shapes: `task` tasks, `batch` transitions of each, `critic` critics side by side.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def critic_target(
    reward: Float[Tensor, "task batch"],
    next_q: Float[Tensor, "critic task batch"],
    next_log_prob: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    discount: float,
) -> Float[Tensor, "task batch"]:
    """The soft value one step on: `r + gamma (min_k Q_k(s', a') - alpha_i log pi(a'|s'))`; always bootstraps (9)."""
    soft_value = next_q.amin(0) - temperature[:, None] * next_log_prob
    return reward + discount * soft_value


def critic_loss(
    q: Float[Tensor, "critic task batch"], target: Float[Tensor, "task batch"], weight: Float[Tensor, " task"]
) -> Float[Tensor, " critic"]:
    """Each critic's squared error, tasks weighted by `weight` (Eq. 10)."""
    per_task = (q - target).square().mean(-1)
    return (per_task * weight).mean(-1)


def actor_loss(
    q: Float[Tensor, "critic task batch"],
    log_prob: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    weight: Float[Tensor, " task"],
) -> Float[Tensor, ""]:
    """`alpha_i log pi(a|s) - min_k Q_k(s, a)`, tasks weighted by `weight` (Eq. 10)."""
    per_task = (temperature[:, None] * log_prob - q.amin(0)).mean(-1)
    return (per_task * weight).mean()


def temperature_loss(
    log_temperature: Float[Tensor, " task"], log_prob: Float[Tensor, "task batch"], target_entropy: float
) -> Float[Tensor, ""]:
    """`-log alpha_i (log pi(a|s) + target entropy)`: one temperature per task, never weighted (12)."""
    return -(log_temperature * (log_prob.detach() + target_entropy).mean(-1)).mean()


def task_weights(log_temperature: Float[Tensor, " task"], form: str) -> Float[Tensor, " task"]:
    """The weight of each task's losses; weights average to 1, so that the losses are means over tasks.

    `released` is `T softmax(-log alpha)` (6), `paper` is `T softmax(-alpha)` (Eq. 10, whose sum over tasks with
    weights that add to 1 is this mean), `none` is 1.
    """
    if form == "none":
        return torch.ones_like(log_temperature)
    logits = -log_temperature if form == "released" else -log_temperature.exp()
    return len(log_temperature) * logits.detach().softmax(-1)
