"""The categorical value head and the policy's loss, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from softmod.kernels.binding import LETTER, Call, call, operation
from softmod.kernels.switch import UPDATE

MOST = 256  # largest batch per task whose values are sorted by insertion


def categorical_target(
    reward: Float[Tensor, "task batch"],
    discount: Float[Tensor, "task batch"],
    next_outputs: Float[Tensor, "critic task batch atom"],
    next_entropy: Float[Tensor, "task batch"],
    support: Float[Tensor, " atom"],
) -> Float[Tensor, "task batch atom"]:
    """Return the projected target distribution (see `Categorical.target`), without a gradient."""
    inputs = (reward, discount, next_outputs.detach(), next_entropy, support)
    projected: Tensor = TARGET(*(value.contiguous() for value in inputs))
    return projected


def cross_entropy(
    outputs: Float[Tensor, "critic task batch atom"],
    target: Float[Tensor, "task batch atom"],
    weight: Float[Tensor, " task"],
) -> Float[Tensor, " critic"]:
    """Compute `softmod.agent.losses.cross_entropy`."""
    inputs = (value.contiguous() for value in (outputs, target, weight))
    loss: Tensor = _CrossEntropy.apply(*inputs)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        loss, log_sum = CROSS_ENTROPY(outputs, target, weight)
        ctx.save_for_backward(outputs, target, weight, log_sum)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return CROSS_ENTROPY_BACKWARD(grad.contiguous(), *ctx.saved_tensors), None, None


def expected_value(
    outputs: Float[Tensor, "critic task batch atom"], support: Float[Tensor, " atom"]
) -> Float[Tensor, "task batch"]:
    """Return the expected values, averaged over critics (see `Categorical.value`)."""
    value: Tensor = _ExpectedValue.apply(outputs.contiguous(), support)
    return value


class _ExpectedValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, support: Tensor) -> Tensor:
        value, log_sum, own = VALUE(outputs, support)
        ctx.save_for_backward(outputs, support, log_sum, own)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return VALUE_BACKWARD(grad.contiguous(), *ctx.saved_tensors), None


def policy_loss(
    value: Float[Tensor, "task batch"],
    log_prob: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    weight: Float[Tensor, " task"],
    least_spread: float,
) -> Float[Tensor, ""]:
    """Compute `softmod.agent.losses.actor_loss`; divide values by their spread if `least_spread`.

    The spread is that of `softmod.agent.losses.spread`.
    """
    inputs = (tensor.contiguous() for tensor in (value, log_prob, temperature, weight))
    loss: Tensor = _PolicyLoss.apply(*inputs, least_spread)
    return loss


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        log_prob: Tensor,
        temperature: Tensor,
        weight: Tensor,
        least_spread: float,
    ) -> Tensor:
        loss, spread = POLICY_LOSS(value, log_prob, temperature, weight, least_spread)
        ctx.batch = value.shape[1]
        ctx.save_for_backward(temperature, weight, spread)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradients = POLICY_LOSS_BACKWARD(grad, *ctx.saved_tensors, ctx.batch)
        return *gradients, None, None, None


def temperature_loss(
    log_temperature: Float[Tensor, " task"],
    log_prob: Float[Tensor, "task batch"],
    target_entropy: float,
) -> Float[Tensor, ""]:
    """Compute `softmod.agent.losses.temperature_loss`."""
    inputs = log_temperature, log_prob.detach().contiguous()
    loss: Tensor = _TemperatureLoss.apply(*inputs, target_entropy)
    return loss


class _TemperatureLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_temperature: Tensor, log_prob: Tensor, target_entropy: float
    ) -> Tensor:
        loss, gradient = TEMPERATURE_LOSS(log_temperature, log_prob, target_entropy)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def distance_weights(rates: Float[Tensor, " task"], start: float) -> Float[Tensor, " task"]:
    """Return weights proportional to `start - rates`, with mean 1."""
    return DISTANCE_WEIGHTS(rates, start)


# --- PyTorch operations ---------------------------------------------------------------------------


def _bind_target(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    name = f"target_{LETTER[args[2].dtype]}"
    critics, tasks, batch, atoms = args[2].shape
    return call(name, UPDATE, *args, *outputs, critics, tasks * batch, atoms)


def _bind_cross_entropy(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call(f"cross_entropy_{LETTER[args[0].dtype]}", UPDATE, *args, *outputs, *args[0].shape)


def _bind_cross_entropy_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    name = f"cross_entropy_backward_{LETTER[args[1].dtype]}"
    return call(name, UPDATE, *args, *outputs, *args[1].shape)


def _bind_value(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    critics, tasks, batch, atoms = args[0].shape
    name = f"value_{LETTER[args[0].dtype]}"
    return call(name, UPDATE, *args, *outputs, critics, tasks * batch, atoms)


def _bind_value_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    critics, tasks, batch, atoms = args[1].shape
    name = f"value_backward_{LETTER[args[1].dtype]}"
    return call(name, UPDATE, *args, *outputs, critics, tasks * batch, atoms)


def _bind_policy_loss(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call("policy_loss", UPDATE, *args[:4], float(args[4]), *outputs, *args[0].shape)


def _bind_policy_loss_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    return call("policy_loss_backward", UPDATE, *args[:4], *outputs, *outputs[0].shape)


def _rows(outputs: Tensor) -> Tensor:
    return outputs.new_empty(outputs.shape[:-1], dtype=torch.float32)


def _bind_temperature_loss(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    inputs = *args[:2], float(args[2])
    return call("temperature_loss", UPDATE, *inputs, *outputs, *args[1].shape)


def _bind_distance_weights(args: Sequence[Any], outputs: Sequence[Tensor]) -> Call:
    rates, start = args
    return call("distance_weights", UPDATE, rates, float(start), *outputs, len(rates))


TEMPERATURE_LOSS = operation(
    "temperature_loss(Tensor log_temperature, Tensor log_prob, float target_entropy)"
    " -> (Tensor loss, Tensor gradient)",
    lambda log_temperature, *_: (
        log_temperature.new_empty(()),
        torch.empty_like(log_temperature),
    ),
    _bind_temperature_loss,
)
DISTANCE_WEIGHTS = operation(
    "distance_weights(Tensor rates, float start) -> Tensor",
    lambda rates, start: (torch.empty_like(rates),),
    _bind_distance_weights,
)
TARGET = operation(
    "target(Tensor reward, Tensor discount, Tensor next, Tensor entropy, Tensor support) -> Tensor",
    lambda reward, discount, following, *_: (
        reward.new_empty((*reward.shape, following.shape[-1])),
    ),
    _bind_target,
)
CROSS_ENTROPY = operation(
    "cross_entropy(Tensor outputs, Tensor target, Tensor weight) -> (Tensor loss, Tensor log_sum)",
    lambda outputs, target, weight: (weight.new_empty(len(outputs)), _rows(outputs)),
    _bind_cross_entropy,
)
CROSS_ENTROPY_BACKWARD = operation(
    "cross_entropy_backward(Tensor grad, Tensor outputs, Tensor target, Tensor weight,"
    " Tensor log_sum) -> Tensor",
    lambda grad, outputs, *_: (torch.empty_like(outputs),),
    _bind_cross_entropy_backward,
)
VALUE = operation(
    "value(Tensor outputs, Tensor support) -> (Tensor value, Tensor log_sum, Tensor own)",
    lambda outputs, support: (_rows(outputs[0]), _rows(outputs), _rows(outputs)),
    _bind_value,
)
VALUE_BACKWARD = operation(
    "value_backward(Tensor grad, Tensor outputs, Tensor support, Tensor log_sum, Tensor own)"
    " -> Tensor",
    lambda grad, outputs, *_: (torch.empty_like(outputs),),
    _bind_value_backward,
)
POLICY_LOSS = operation(
    "policy_loss(Tensor value, Tensor log_prob, Tensor temperature, Tensor weight, float least)"
    " -> (Tensor loss, Tensor spread)",
    lambda value, log_prob, temperature, *_: (value.new_empty(()), torch.empty_like(temperature)),
    _bind_policy_loss,
)
POLICY_LOSS_BACKWARD = operation(
    "policy_loss_backward(Tensor grad, Tensor temperature, Tensor weight, Tensor spread, int batch)"
    " -> (Tensor for_value, Tensor for_log_prob)",
    lambda grad, temperature, weight, spread, batch: (
        spread.new_empty((len(spread), batch)),
        spread.new_empty((len(spread), batch)),
    ),
    _bind_policy_loss_backward,
)
