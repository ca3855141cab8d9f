"""The steps of an update: clipping, optimizers, rollback, target critics and averaged policy.

`Steps` makes them with PyTorch's optimizers, `FusedSteps` with the C kernels of `softmod.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmod import kernels
from softmod.agent.update import Rollback, all_finite, clip_stacked, move_targets, step_if
from softmod.networks.network import Network

LOG_TEMPERATURE = 10.0  # temperatures stay in [exp(-10), exp(10)], about [5e-5, 2e4]


class Steps:
    """The steps of an agent's update, which change nothing if the update is not finite.

    A method that takes the flag `finite` reads it on the device.

    Args:
        agent: its networks and temperatures are stepped by its optimizers.
    """

    clips = True  # `norms` clips the gradient; otherwise the step does

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def norms(self, network: Network) -> Float[Tensor, " stack"]:
        """Clip the gradient of each member of a network; return the norms before clipping."""
        return clip_stacked(list(network.parameters()), network.members, self.agent.clip_norm)

    def finite(self, *values: Tensor) -> Bool[Tensor, ""]:
        """Return a flag on the device: True if all elements are finite."""
        return all_finite(*values)

    def try_critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        """Step the critics; `settle_critics` moves the targets or undoes the step."""
        _, critic, _ = self.agent.own_optimizers()
        self._step(critic, finite, norms, self._remember(critic))

    def settle_critics(self, finite: Bool[Tensor, ""]) -> None:
        """Move the targets towards the critics if the update is finite; else undo the step."""
        self.agent.rollback.restore_unless(finite)
        self._move_targets(finite)

    def critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        """Step the critics and move the targets."""
        _, critic, _ = self.agent.own_optimizers()
        self._step(critic, finite, norms)
        self._move_targets(finite)

    def actor(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        """Step the policy and move the averaged policy."""
        actor, _, _ = self.agent.own_optimizers()
        self._step(actor, finite, norms)
        if self.agent.averaged_actor is not None:
            move(self.agent.averaged_actor, self.agent.actor, self.agent.policy_averaging, finite)

    def temperatures(self, finite: Bool[Tensor, ""]) -> None:
        """Step and clamp the temperatures."""
        _, _, temperature = self.agent.own_optimizers()
        self._step(temperature, finite)
        self._clamp()

    def try_temperatures(self, finite: Bool[Tensor, ""]) -> None:
        """Step and clamp the temperatures; `settle_temperatures` may undo it."""
        _, _, temperature = self.agent.own_optimizers()
        self._step(temperature, finite, rollback=self._remember(temperature))
        self._clamp()

    def settle_temperatures(self, finite: Bool[Tensor, ""]) -> None:
        """Undo the step of the temperatures unless the update is finite."""
        self.agent.rollback.restore_unless(finite)

    @torch.no_grad()
    def _clamp(self) -> None:
        self.agent.log_temperature.clamp_(-LOG_TEMPERATURE, LOG_TEMPERATURE)

    def _move_targets(self, finite: Bool[Tensor, ""]) -> None:
        smoothing = self.agent.target_smoothing
        move(self.agent.target_critic, self.agent.critic, smoothing, finite)

    def _remember(self, optimizer: Any) -> Rollback:
        """Return the rollback of an optimizer's step; its buffers are allocated once."""
        if self.agent.rollback is None:
            self.agent.rollback = Rollback(optimizer)
        self.agent.rollback.save()
        return self.agent.rollback

    def _step(
        self,
        optimizer: Any,
        finite: Bool[Tensor, ""],
        norms: Tensor | None = None,
        rollback: Rollback | None = None,
    ) -> None:
        """Step an optimizer if the update is finite.

        Args:
            optimizer: the optimizer.
            finite: the flag.
            norms: the gradient norms, for clipping.
            rollback: the copy of the state before the step.
        """
        step_if(optimizer, finite)


class FusedSteps(Steps):
    """The same steps on a CPU, fused with clipping, the copy that undoes them, and the targets."""

    clips = False

    def norms(self, network: Network) -> Float[Tensor, " stack"]:
        """Return the gradient norms; the step clips."""
        return kernels.optimizer.gradient_norms(list(network.parameters()), network.members)

    def critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        """Step the critics and move the targets, in one pass if all parameters have a gradient."""
        if not all(kernels.gradient(p) is not None for p in self.agent.critic.parameters()):
            super().critics(finite, norms)
            return
        _, critic, _ = self.agent.own_optimizers()
        self._step(critic, finite, norms, targets=list(self.agent.target_critic.parameters()))

    def _remember(self, optimizer: Any) -> Rollback:
        """Return the rollback of an optimizer's step, which copies the state."""
        if self.agent.rollback is None:
            self.agent.rollback = Rollback(optimizer)
        self.agent.rollback.leave_to_step()
        return self.agent.rollback

    def _step(
        self,
        optimizer: Any,
        finite: Bool[Tensor, ""],
        norms: Tensor | None = None,
        rollback: Rollback | None = None,
        targets: Sequence[Tensor] = (),
    ) -> None:
        if not finite:
            return
        own = inner(optimizer)
        kernels.optimizer.adam(
            own,
            norms=norms,
            max_norm=self.agent.clip_norm,
            kept=() if rollback is None else rollback.kept(own),
            saved=None if rollback is None else rollback.saved,
            targets=targets,
            smoothing=self.agent.target_smoothing,
        )


def move(target: nn.Module, source: nn.Module, smoothing: float, finite: Bool[Tensor, ""]) -> None:
    """Move a network's parameters towards those of another if the update is finite."""
    sources = [parameter.detach() for parameter in source.parameters()]
    move_targets(list(target.parameters()), sources, smoothing, finite)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside Fabric's wrapper."""
    own: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return own
