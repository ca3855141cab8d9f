"""The steps of an update: clipping, optimizers, rollback, target critics and averaged policy.

`Steps` makes them with PyTorch's optimizers, `FusedSteps` with the C kernels of `softmod.kernels`,
and `FlatSteps`, for GPUs, on flat buffers in few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from softmod import kernels
from softmod.agent.update import Rollback, all_finite, clip_stacked, move_targets, step_if
from softmod.kernels import formulas
from softmod.kernels.flat import FlatAdam
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
        self._copies: dict[Tensor, Tensor] = {}  # in bfloat16, by weight

    def norms(self, network: Network) -> Float[Tensor, " stack"]:
        """Clip the gradient of each member of a network; return the norms before clipping."""
        return clip_stacked(list(network.parameters()), network.members, self.agent.clip_norm)

    def copies(self) -> dict[Tensor, Tensor]:
        """Return copies in bfloat16 of the weights that updates read, made now in fixed memory."""
        if not self._copies:
            for network in self._networks:
                for parameter in network.parameters():
                    made = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
                    self._copies[parameter] = made
        for network in self._networks:
            self._renew(network)
        return self._copies

    @property
    def _networks(self) -> tuple[Network, ...]:
        return self.agent.actor, self.agent.critic, self.agent.target_critic

    @torch.no_grad()
    def _renew(self, network: Network) -> None:
        """Renew the copies of a network's weights."""
        weights: list[Tensor] = list(network.parameters())
        torch._foreach_copy_([self._copies[weight] for weight in weights], weights)

    def finite(self, *values: Tensor, also: Bool[Tensor, ""] | None = None) -> Bool[Tensor, ""]:
        """Return a flag on the device: True if all elements are finite, and `also` is True."""
        return all_finite(*values) if also is None else also & all_finite(*values)

    def try_critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        """Step the critics; `settle_critics` moves the targets or undoes the step."""
        _, critic, _ = self.agent.own_optimizers()
        self._step(critic, finite, norms, self._remember(critic))
        if self._copies:
            self._renew(self.agent.critic)

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


class FlatSteps(Steps):
    """The same steps on flat buffers, without waiting for a flag.

    Parameters and the state of the optimizers become views of the buffers. Triton kernels make the
    steps. They are launched without PyTorch's dispatcher, so formulas replace them where operations
    are recorded.

    Args:
        agent: its networks and temperatures are stepped.
        optimizers: of actor, critics and temperatures, with initialized state.
        triton: whether Triton kernels make the steps; otherwise formulas do.
    """

    clips = False

    def __init__(
        self, agent: Any, optimizers: Sequence[torch.optim.Optimizer], triton: bool
    ) -> None:
        super().__init__(agent)
        actor, critic, temperature = optimizers
        self.triton = triton
        self._actor = FlatAdam(actor, agent.actor.members)
        self._critic = FlatAdam(critic, agent.critic.members)
        self._temperature = FlatAdam(temperature, 1)
        targets = list(agent.target_critic.parameters())
        self._target = self._critic.layout.move_into_buffer(targets)
        self._average: Tensor | None = None
        if agent.averaged_actor is not None:
            averages = list(agent.averaged_actor.parameters())
            self._average = self._actor.layout.move_into_buffer(averages)
        self._gradients: dict[FlatAdam, Tensor] = {}  # of this update
        self._halves: list[Tensor] = []  # copies in bfloat16 of actor, critic and target
        self._tried: Tensor | None = None  # the flag of a step that may be undone

    @torch.no_grad()
    def copies(self) -> dict[Tensor, Tensor]:
        weights = [self._actor.weights, self._critic.weights, self._target]
        if not self._halves:
            self._halves = [torch.empty_like(own, dtype=torch.bfloat16) for own in weights]
            layouts = (self._actor.layout, self._critic.layout, self._critic.layout)
            for network, layout, half in zip(self._networks, layouts, self._halves, strict=True):
                views = layout.views(half)
                self._copies |= dict(zip(network.parameters(), views, strict=True))
        torch._foreach_copy_(self._halves, weights)
        return self._copies

    @property
    def _by(self) -> Any:
        """Return the module with the functions that make the steps."""
        if not self.triton or recording():
            return formulas
        from softmod.kernels import triton_steps

        return triton_steps

    def norms(self, network: Network) -> Float[Tensor, " stack"]:
        """Return the gradient norms; the step clips."""
        own = self._critic if network is self.agent.critic else self._actor
        self._gradients[own] = own.gradient()
        norms: Tensor = self._by.norms(own, self._gradients[own])
        return norms

    def finite(self, *values: Tensor, also: Bool[Tensor, ""] | None = None) -> Bool[Tensor, ""]:
        flag: Tensor = self._by.all_finite(values, also)
        return flag

    def try_critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        self._tried = finite
        half = self._halves[1] if self._halves else None  # the policy's loss reads it
        self._flat_step(self._critic, finite, norms=norms, keep=True, half=half)

    def settle_critics(self, finite: Bool[Tensor, ""]) -> None:
        smoothing = self.agent.target_smoothing
        self._by.settle(self._critic, self._tried, finite, self._target, smoothing)

    def critics(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        smoothing = self.agent.target_smoothing
        self._flat_step(self._critic, finite, norms=norms, target=self._target, smoothing=smoothing)

    def actor(self, finite: Bool[Tensor, ""], norms: Float[Tensor, " stack"]) -> None:
        smoothing = self.agent.policy_averaging
        self._flat_step(self._actor, finite, norms=norms, target=self._average, smoothing=smoothing)

    def temperatures(self, finite: Bool[Tensor, ""]) -> None:
        self._gradients[self._temperature] = self._temperature.gradient()
        self._flat_step(self._temperature, finite, limit=LOG_TEMPERATURE)

    def try_temperatures(self, finite: Bool[Tensor, ""]) -> None:
        self._tried = finite
        self._gradients[self._temperature] = self._temperature.gradient()
        self._flat_step(self._temperature, finite, keep=True, limit=LOG_TEMPERATURE)

    def settle_temperatures(self, finite: Bool[Tensor, ""]) -> None:
        self._by.settle(self._temperature, self._tried, finite)

    def _flat_step(self, own: FlatAdam, finite: Bool[Tensor, ""], **options: Any) -> None:
        gradient = self._gradients.pop(own)
        self._by.adam(own, gradient, finite, max_norm=self.agent.clip_norm, **options)


def recording() -> bool:
    """Return whether operations are recorded or traced as they reach PyTorch's dispatcher."""
    return _get_current_dispatch_mode() is not None


def move(target: nn.Module, source: nn.Module, smoothing: float, finite: Bool[Tensor, ""]) -> None:
    """Move a network's parameters towards those of another if the update is finite."""
    sources = [parameter.detach() for parameter in source.parameters()]
    move_targets(list(target.parameters()), sources, smoothing, finite)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside Fabric's wrapper."""
    own: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return own
