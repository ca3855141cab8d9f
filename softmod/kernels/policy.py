"""Samples of the tanh-Gaussian policy, and the preparation of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from softmod.kernels.binding import LETTER, Call, call, operation
from softmod.kernels.switch import UPDATE


def sample(
    outputs: Float[Tensor, "*batch two_actions"], noise: Float[Tensor, "*batch action"], tanh: bool
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, " *batch"]]:
    """Return actions and log-probabilities in fp32 (see `softmod.networks.gaussian`).

    Args:
        outputs: the network's outputs: means, and what determines the standard deviations.
        noise: standard normal noise.
        tanh: whether the log standard deviation is bounded by "tanh", not by "clamp".
    """
    outputs, noise = outputs.contiguous(), noise.contiguous()
    if not torch.is_grad_enabled():
        return SAMPLE(outputs, noise, tanh)
    return _Sample.apply(outputs, noise, tanh)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, noise: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
        action, log_prob = SAMPLE(outputs, noise, tanh)
        ctx.tanh = tanh
        ctx.save_for_backward(outputs, noise, action)
        return action, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_action: Tensor, for_log_prob: Tensor) -> tuple[Tensor, None, None]:
        grads = for_action.contiguous(), for_log_prob.contiguous()
        return SAMPLE_BACKWARD(*grads, *ctx.saved_tensors, ctx.tanh), None, None


def normalize_obs(
    obs: Float[Tensor, "*batch obs"],
    mean: Float[Tensor, " obs"],
    scale: Float[Tensor, " obs"],
    limit: float,
) -> Float[Tensor, "*batch obs"]:
    """Return `(obs - mean) * scale`, clipped to +-limit."""
    return OBSERVE(obs.contiguous(), mean, scale, limit)


def scale_rewards(
    reward: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    largest: Float[Tensor, " task"],
    entropy: float,
    values: float,
) -> Float[Tensor, "task batch"]:
    """Divide rewards by `(largest + entropy * temperature) / values` where `largest` > 0."""
    args = reward.contiguous(), temperature, largest, entropy, values
    return SCALE_REWARDS(*args)


# --- PyTorch operations ---------------------------------------------------------------------------


def _bind_sample(args: Sequence[Any], results: Sequence[Tensor]) -> Call:
    outputs, noise, tanh = args
    rows, actions = noise[..., 0].numel(), noise.shape[-1]
    name = f"sample_{LETTER[outputs.dtype]}"
    return call(name, UPDATE, outputs, noise, *results, rows, actions, tanh)


def _bind_sample_backward(args: Sequence[Any], results: Sequence[Tensor]) -> Call:
    *tensors, tanh = args
    rows, actions = args[3][..., 0].numel(), args[3].shape[-1]
    name = f"sample_backward_{LETTER[args[2].dtype]}"
    return call(name, UPDATE, *tensors, *results, rows, actions, tanh)


def _bind_observe(args: Sequence[Any], results: Sequence[Tensor]) -> Call:
    *tensors, limit = args
    rows, width = args[0][..., 0].numel(), args[0].shape[-1]
    return call("observe", UPDATE, *tensors, float(limit), *results, rows, width)


def _bind_scale_rewards(args: Sequence[Any], results: Sequence[Tensor]) -> Call:
    options = (float(option) for option in args[3:])
    return call("scale_rewards", UPDATE, *args[:3], *options, *results, *args[0].shape)


SAMPLE = operation(
    "sample(Tensor outputs, Tensor noise, bool tanh) -> (Tensor action, Tensor log_prob)",
    lambda outputs, noise, tanh: (torch.empty_like(noise), noise.new_empty(noise.shape[:-1])),
    _bind_sample,
)
SAMPLE_BACKWARD = operation(
    "sample_backward(Tensor for_action, Tensor for_log_prob, Tensor outputs, Tensor noise,"
    " Tensor action, bool tanh) -> Tensor",
    lambda for_action, for_log_prob, outputs, *_: (torch.empty_like(outputs),),
    _bind_sample_backward,
)
OBSERVE = operation(
    "observe(Tensor obs, Tensor mean, Tensor scale, float limit) -> Tensor",
    lambda obs, *_: (torch.empty_like(obs),),
    _bind_observe,
)
SCALE_REWARDS = operation(
    "scale_rewards(Tensor reward, Tensor temperature, Tensor largest, float entropy, float values)"
    " -> Tensor",
    lambda reward, *_: (torch.empty_like(reward),),
    _bind_scale_rewards,
)
