"""Targets, losses and gradient norms equal those of the released multi-task SAC's update.

Weights and noise are the same.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from softmod.agent import losses
from softmod.agent.update import clip_stacked
from softmod.networks.gaussian import split, squash
from tests.released import build, golden, sizes


def by_task(array):
    """Transpose stored arrays `[batch, task, ...]` to `[task, batch, ...]`."""
    return torch.from_numpy(np.swapaxes(array, 0, 1).copy()).double()


@pytest.fixture(scope="module")
def data():
    return golden("dev_update")


def sample(network, obs, noise):
    """Return the action, its log-probability, and the log-probability of the released code.

    The latter uses the correction `log(1 - a^2 + 1e-6)`.
    """
    mean, log_std = split(network(obs)[0], "clamp")
    action, log_prob = squash(mean, log_std, noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return action, log_prob, (gaussian - (1 - action.square() + 1e-6).log()).sum(-1)


@pytest.fixture(scope="module")
def update(data):
    """Compute all results of the released update with this package's functions."""
    size = sizes(data)
    actor = build(data, ["actor"], size["obs"], 2 * size["action"])
    critic = build(data, ["q1", "q2"], size["obs"] + size["action"], 1)
    target = build(data, ["target_q1", "target_q2"], size["obs"] + size["action"], 1)
    obs, next_obs, action = by_task(data["obs"]), by_task(data["next_obs"]), by_task(data["action"])
    log_alpha = torch.from_numpy(data["log_alpha"]).requires_grad_()
    alpha = log_alpha.detach().exp()
    weight = losses.task_weights(log_alpha, "released")
    new_action, exact, log_prob = sample(actor, obs, by_task(data["noise"]))
    with torch.no_grad():
        next_action, next_exact, next_log_prob = sample(
            actor, next_obs, by_task(data["next_noise"])
        )
        next_q = target(torch.cat([next_obs, next_action], -1)).squeeze(-1)
    reward = by_task(data["reward"]).squeeze(-1)
    discount = torch.full_like(reward, float(data["gamma"]))
    q_target = losses.critic_target(reward, discount, next_q, -(alpha[:, None] * next_log_prob))
    q = critic(torch.cat([obs, action], -1)).squeeze(-1)
    critic_losses = losses.critic_loss(q, q_target, weight)
    critic_losses.sum().backward()
    critic_norms = clip_stacked(list(critic.parameters()), 2, 1.0)
    critic.requires_grad_(False)
    new_q = critic(torch.cat([obs, new_action], -1)).squeeze(-1)
    policy_loss = losses.actor_loss(new_q.amin(0), log_prob, alpha, weight)
    policy_loss.backward()
    alpha_loss = losses.temperature_loss(log_alpha, log_prob, -float(size["action"]))
    alpha_loss.backward()
    return {
        "q_target": q_target.T[..., None],
        "log_prob": log_prob.T[..., None], "next_log_prob": next_log_prob.T[..., None],
        "task_weight": weight[None, :, None], "policy_loss": policy_loss,
        "q1_loss": critic_losses[0],
        "q2_loss": critic_losses[1], "alpha_loss": alpha_loss, "alpha_grad": log_alpha.grad,
        "policy_grad_norm": clip_stacked(list(actor.parameters()), 1, 1.0)[0],
        "q1_grad_norm": critic_norms[0], "q2_grad_norm": critic_norms[1],
        "exact": exact.T[..., None], "next_exact": next_exact.T[..., None],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["q_target", "log_prob", "next_log_prob", "task_weight", "policy_loss", "q1_loss", "q2_loss",
     "alpha_loss",
     "alpha_grad", "policy_grad_norm", "q1_grad_norm", "q2_grad_norm"],
)  # fmt: skip
def test_equals_the_released_update(update, data, name):
    np.testing.assert_allclose(update[name].detach().numpy(), data[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "released"), [("exact", "log_prob"), ("next_exact", "next_log_prob")]
)
def test_the_exact_tanh_correction_agrees_with_the_released_one(update, data, ours, released):
    np.testing.assert_allclose(update[ours].detach().numpy(), data[released], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["paper", "none"])
def test_other_task_weights_miss_the_released_ones(data, form):
    weight = losses.task_weights(torch.from_numpy(data["log_alpha"]), form)
    assert not np.allclose(weight.numpy(), data["task_weight"].ravel(), rtol=1e-2)
    np.testing.assert_allclose(weight.mean(), 1.0)
