"""MTSAC: soft actor-critic on many tasks at once, with a temperature per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softmod.agent import conflicts, losses
from softmod.agent.update import Rollback, all_finite, clip_stacked, materialize, move_targets, step_if
from softmod.agent.whole import Update
from softmod.networks.network import Network
from softmod.networks.policy import split, squash
from softmod.randomness import Purpose, torch_generator
from softmod.replay import Batch, Replay
from softmod.types import EnvSpec

Metrics = dict[str, Tensor]
ALL = slice(None)  # tasks
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
RECENT = 200  # states of each task that routes are averaged over
LOG_TEMPERATURE = 10.0  # temperatures stay in [exp(-10), exp(10)], about [5e-5, 2e4]


class MTSAC(L.LightningModule):
    """The update of multi-task SAC on a batch `[task, batch, ...]`, as a LightningModule with manual optimization.

    Args:
        spec: the tasks and sizes.
        actor: a network with one member, `obs -> 2 * action`.
        critic: a network with two members, `obs + action -> 1`; its targets start as a copy.
        optimizers: how to make the optimizer of "actor", "critic" and "temperature" from parameters.
        batch_per_task: transitions of each task in an update.
        seed: keys the noise of every update.
        discount, target_smoothing: gamma and tau.
        initial_temperature: alpha of every task at the start.
        target_entropy_per_action: times the action's size is the target entropy (-1: -|A|).
        task_weights: "released", "paper" or "none" (difference 6; Eq. 10).
        update_order: "sequential" (critic, then policy with the new critic, then temperature) or "released" (12).
        clip_norm: of the policy's and of each critic's gradient (8); 0 is off.
        gradient_surgery: "none", or "pcgrad": tasks' gradients lose what conflicts (Yu et al. 2020).

    Raises:
        ValueError: gradient surgery on networks whose tasks share nothing.
    """

    indices: Tensor  # of the tasks
    order: Tensor  # of tasks in gradient surgery, for critics and actor

    def __init__(
        self,
        spec: EnvSpec,
        actor: Network,
        critic: Network,
        optimizers: Mapping[str, MakeOptimizer],
        batch_per_task: int,
        seed: int = 0,
        *,
        discount: float = 0.99,
        target_smoothing: float = 0.005,
        initial_temperature: float = 1.0,
        target_entropy_per_action: float = -1.0,
        task_weights: str = "released",
        update_order: str = "sequential",
        clip_norm: float = 1.0,
        gradient_surgery: str = "none",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec, self.batch_per_task, self.seed = spec, batch_per_task, seed
        self.discount, self.target_smoothing, self.clip_norm = discount, target_smoothing, clip_norm
        self.task_weights, self.update_order, self.gradient_surgery = task_weights, update_order, gradient_surgery
        if gradient_surgery != "none" and (actor.independent or critic.independent):
            raise ValueError(f"gradient_surgery={gradient_surgery}: tasks of {type(actor).__name__} share no weights")
        self.target_entropy = target_entropy_per_action * spec.action_dim
        self.actor, self.critic = actor, critic
        self.target_critic = deepcopy(critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.full((spec.num_tasks,), initial_temperature).log())
        self.register_buffer("indices", torch.arange(spec.num_tasks), persistent=False)
        self.register_buffer("order", torch.zeros(2, spec.num_tasks, spec.num_tasks), persistent=False)
        self.make_optimizers = optimizers
        self.run: Update = self.update  # or another way to run it (softmod.agent.whole)
        self.updates = 0  # ever made
        self.skipped: Tensor | None = None  # updates in a row that were not finite, on the device
        self.rollback: Rollback | None = None  # of the first step of an update, from the first update on

    # --- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        obs: Float[Tensor, "task copy obs"],
        tasks: Int[Tensor, " task"] | None = None,
        noise: Float[Tensor, "task copy action"] | None = None,
    ) -> Float[Tensor, "task copy action"]:
        """Actions for some of the tasks (None: all); without noise the deterministic ones."""
        training = self.actor.training
        mean, log_std = split(self.actor.eval()(obs, tasks)[0])
        self.actor.train(training)
        return mean.tanh() if noise is None else squash(mean, log_std, noise)[0]

    def policy(self) -> dict[str, Tensor]:
        """The frozen weights that workers act with for a round: a copy, on the CPU, in one transfer."""
        weights = self.actor.state_dict()
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in weights.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in weights.values()])
        return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}

    # --- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self, replay: Replay, updates: int, stop: Callable[[], bool] = lambda: False, examine: bool = False
    ) -> Metrics:
        """The updates of a round, on what the replay holds; the metrics of the last one. Synchronises nothing.

        `stop` is asked before each update; where it says so, the others are left out, and the metrics are not whole.
        `examine` adds what costs about as much as one more update: how the tasks' gradients agree on the last batch.
        """
        metrics: Metrics = {}
        for _ in range(updates):
            if stop():
                return metrics
            draws = torch_generator(replay.rows.device, self.seed, Purpose.BATCH, self.updates)
            batch = replay.sample(self.batch_per_task, draws)
            metrics = self.training_step(batch, self.updates)
            self.skipped = self._in_a_row(metrics["finite"])
            metrics["skipped_in_a_row"] = self.skipped
        if not updates:
            return metrics
        return metrics | self.routing_entropies(batch.obs) | (self.gradient_agreement() if examine else {})

    def _in_a_row(self, finite: Tensor) -> Tensor:
        before = torch.zeros((), device=finite.device) if self.skipped is None else self.skipped
        return torch.where(finite, 0.0, before + 1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Metrics:
        """One update of critics, policy, temperatures and targets; `batch_idx` is Lightning's and not used."""
        draws = torch_generator(batch.obs.device, self.seed, Purpose.UPDATE, self.updates)
        noise = torch.randn((2, *batch.action.shape), generator=draws, device=batch.action.device)
        self.draw()
        self.updates += 1
        self.given = Batch(*batch), noise[0], noise[1]  # kept until the next one, for the case that it goes wrong
        return self.run(*self.given)

    def draw(self) -> None:
        """What else is random in the next update: within networks, and the order of tasks in gradient surgery."""
        draws = torch_generator(self.order.device, self.seed, Purpose.INSIDE, self.updates)
        for network in (self.actor, self.critic, self.target_critic):
            network.draw(self.batch_per_task, draws)
        if self.gradient_surgery != "none":
            self.order.uniform_(generator=draws)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the actor, the critics and the temperatures, in this order; their state exists from the start."""
        parameters = {
            "actor": list(self.actor.parameters()),
            "critic": list(self.critic.parameters()),
            "temperature": [self.log_temperature],
        }
        optimizers = [self.make_optimizers[name](parameters[name]) for name in parameters]
        for optimizer in optimizers:
            materialize(optimizer)
        return optimizers

    def update(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """The update as a function of tensors, on one device and without waiting for it; all randomness comes in."""
        with self._autocast():
            if self.update_order == "released":
                return self._update_released(batch, noise, next_noise)
            return self._update_sequential(batch, noise, next_noise)

    def _update_sequential(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """Critics, then the policy with the new critics, then temperatures; all of it or nothing (finite flag)."""
        actor_optimizer, critic_optimizer, temperature_optimizer = self._optimizers()
        temperature, weight = self._temperature_and_weight()

        critic_losses, critic_norms = self._critic_gradient(batch, next_noise, temperature, weight)
        rollback = self._remember(critic_optimizer)
        finite = all_finite(critic_losses, critic_norms)
        step_if(critic_optimizer, finite)

        actor_loss, actor_norm, log_prob = self._actor_gradient(batch, noise, temperature, weight)
        temperature_loss = self._temperature_gradient(log_prob)
        finite = finite & all_finite(actor_loss, actor_norm, temperature_loss)
        step_if(actor_optimizer, finite)
        self._step_temperatures(temperature_optimizer, finite)
        rollback.unless(finite)
        self._move_targets(finite)
        return self._metrics(critic_losses, actor_loss, temperature_loss, critic_norms, actor_norm, weight, finite)

    def _update_released(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """All losses at the networks from before the update; temperatures step first, their new value is used (12)."""
        actor_optimizer, critic_optimizer, temperature_optimizer = self._optimizers()
        rollback = self._remember(temperature_optimizer)

        with torch.no_grad():
            _, log_prob = squash(*split(self.actor(batch.obs)[0]), noise)
        temperature_loss = self._temperature_gradient(log_prob)
        finite = all_finite(temperature_loss)
        self._step_temperatures(temperature_optimizer, finite)

        temperature, weight = self._temperature_and_weight()
        critic_losses, critic_norms = self._critic_gradient(batch, next_noise, temperature, weight)
        actor_loss, actor_norm, _ = self._actor_gradient(batch, noise, temperature, weight)
        finite = finite & all_finite(critic_losses, critic_norms, actor_loss, actor_norm)
        step_if(critic_optimizer, finite)
        step_if(actor_optimizer, finite)
        rollback.unless(finite)
        self._move_targets(finite)
        return self._metrics(critic_losses, actor_loss, temperature_loss, critic_norms, actor_norm, weight, finite)

    # --- the parts of an update ---------------------------------------------------------------------------------------

    def _temperature_and_weight(self) -> tuple[Tensor, Tensor]:
        log_temperature = self.log_temperature.detach()
        return log_temperature.exp(), losses.task_weights(log_temperature, self.task_weights)

    def _critic_gradient(
        self, batch: Batch, next_noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses and gradient norms of each critic; the (clipped) gradient is left on its parameters."""
        loss = self._critic_loss(batch, next_noise, temperature, weight)
        return self._gradient(loss, self.critic, self.order[0])

    def _actor_gradient(
        self, batch: Batch, noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient norm and log-probabilities; critics pass the gradient on and keep none of it."""
        log_probs: list[Tensor] = []
        self.critic.requires_grad_(False)
        loss = self._actor_loss(batch, noise, temperature, weight, log_probs)
        value, norm = self._gradient(loss, self.actor, self.order[1])
        self.critic.requires_grad_(True)
        return value, norm, torch.cat(log_probs) if len(log_probs) > 1 else log_probs[0]

    def _critic_loss(self, batch: Batch, next_noise: Tensor, temperature: Tensor, weight: Tensor) -> conflicts.Loss:
        """The critics' losses `[critic]` as a function of the tasks that count."""
        with torch.no_grad():
            next_action, next_log_prob = squash(*split(self.actor(batch.next_obs)[0]), next_noise)
            next_q = self._q(self.target_critic, batch.next_obs, next_action)
            target = losses.critic_target(batch.reward, next_q, next_log_prob, temperature, self.discount)

        def loss(tasks: slice) -> Tensor:
            q = self._q(self.critic, batch.obs[tasks], batch.action[tasks], self._indices(tasks))
            return losses.critic_loss(q, target[tasks], weight[tasks])

        return loss

    def _actor_loss(
        self, batch: Batch, noise: Tensor, temperature: Tensor, weight: Tensor, log_probs: list[Tensor]
    ) -> conflicts.Loss:
        """The policy's loss as a function of the tasks that count, whose log-probabilities it adds to `log_probs`."""

        def loss(tasks: slice) -> Tensor:
            obs, indices = batch.obs[tasks], self._indices(tasks)
            action, log_prob = squash(*split(self.actor(obs, indices)[0]), noise[tasks])
            log_probs.append(log_prob.detach())
            q = self._q(self.critic, obs, action, indices)
            return losses.actor_loss(q, log_prob, temperature[tasks], weight[tasks])

        return loss

    def _indices(self, tasks: slice) -> Tensor | None:
        return None if tasks == ALL else self.indices[tasks]

    def _gradient(self, loss: conflicts.Loss, network: Network, order: Tensor) -> tuple[Tensor, Tensor]:
        """A loss, and its gradient on a network's parameters, clipped per member; its norms before, per member.

        Tasks that share nothing are agents of their own: their losses add up, and each one's gradient is clipped.
        """
        network.zero_grad()
        if self.gradient_surgery == "none":
            value = loss(ALL)
            self.manual_backward(value.sum() * self.spec.num_tasks if network.independent else value.sum())
        else:
            values, gradients = conflicts.task_gradients(loss, network, self.spec.num_tasks)
            conflicts.set_gradient(network, conflicts.pcgrad(gradients, order))
            value = values.mean(0)
        return value.detach(), clip_stacked(list(network.parameters()), network.members, self.clip_norm)

    def _temperature_gradient(self, log_prob: Tensor) -> Tensor:
        self.log_temperature.grad = None
        loss = losses.temperature_loss(self.log_temperature, log_prob, self.target_entropy)
        self.manual_backward(loss)
        return loss.detach()

    @torch.no_grad()
    def _step_temperatures(self, optimizer: Any, finite: Bool[Tensor, ""]) -> None:
        """Step, and stay in the range that no run should come to leave."""
        step_if(optimizer, finite)
        self.log_temperature.clamp_(-LOG_TEMPERATURE, LOG_TEMPERATURE)

    def _q(self, critic: nn.Module, obs: Tensor, action: Tensor, tasks: Tensor | None = None) -> Tensor:
        """`[critic, task, batch]`"""
        return critic(torch.cat([obs, action], -1), tasks).squeeze(-1)

    def _move_targets(self, finite: Bool[Tensor, ""]) -> None:
        targets, sources = list(self.target_critic.parameters()), list(self.critic.parameters())
        move_targets(targets, [source.detach() for source in sources], self.target_smoothing, finite)

    def _optimizers(self) -> tuple[Any, Any, Any]:
        """Of the actor, the critics and the temperatures, as Fabric or a Trainer wrapped them."""
        actor, critic, temperature = self.optimizers()  # type: ignore[attr-defined]
        return actor, critic, temperature

    def _remember(self, optimizer: Any) -> Rollback:
        """A copy of what the first step of an update changes, in buffers that are kept."""
        if self.rollback is None:
            self.rollback = Rollback(optimizer)
        self.rollback.remember()
        return self.rollback

    def _autocast(self) -> AbstractContextManager[Any]:
        """Fabric's precision; a Trainer sets its own."""
        return nullcontext() if self.fabric is None else self.fabric.autocast()

    # --- telling ------------------------------------------------------------------------------------------------------

    def _metrics(
        self,
        critic_losses: Tensor,
        actor_loss: Tensor,
        temperature_loss: Tensor,
        critic_norms: Tensor,
        actor_norm: Tensor,
        weight: Tensor,
        finite: Tensor,
    ) -> Metrics:
        """The update's numbers, left on the device; `temperature` and `task_weight` are `[task]`."""
        return {
            "critic_loss": critic_losses.mean(),
            "actor_loss": actor_loss,
            "temperature_loss": temperature_loss,
            "critic_gradient_norm": critic_norms.mean(),
            "actor_gradient_norm": actor_norm.mean(),
            "temperature": self.log_temperature.detach().exp(),
            "task_weight": weight,
            "finite": finite,
        }

    @torch.no_grad()
    def routing_entropies(self, obs: Float[Tensor, "task batch obs"]) -> Metrics:
        """Entropy of each routing layer of the actor in nats, `[layer]`; nothing for networks that do not route."""
        routes = self.actor.routing(obs)
        return {"routing_entropy": torch.stack([entropy(route) for route in routes])} if routes else {}

    @torch.no_grad()
    def routes(self, replay: Replay) -> list[Float[Tensor, "task target source"]]:
        """The actor's routing probabilities per layer, a mean over each task's newest states; empty where none."""
        if not replay.size:
            return []
        training = self.actor.training
        routes = self.actor.eval().routing(replay.newest(RECENT))
        self.actor.train(training)
        return [route[0].mean(1) for route in routes]

    def gradient_agreement(self) -> Metrics:
        """How the tasks' gradients agree on the last batch, of "actor" and "critic" (softmod.agent.conflicts).

        Nothing for a single task, and for networks whose tasks share nothing.
        """
        if self.spec.num_tasks < 2 or self.actor.independent or self.critic.independent:
            return {}
        (batch, noise, next_noise), (temperature, weight) = self.given, self._temperature_and_weight()
        with self._autocast():
            of = {
                "actor": (self._actor_loss(batch, noise, temperature, weight, []), self.actor),
                "critic": (self._critic_loss(batch, next_noise, temperature, weight), self.critic),
            }
            told: Metrics = {}
            for name, (loss, network) in of.items():
                _, gradients = conflicts.task_gradients(loss, network, self.spec.num_tasks)
                told |= {
                    f"gradients/{key}/{name}": value
                    for key, value in conflicts.agreement(conflicts.cosines(gradients)).items()
                }
        return told


def entropy(probabilities: Float[Tensor, "*batch source"]) -> Float[Tensor, ""]:
    """The mean entropy of distributions over sources, in nats; log of their number when uniform."""
    return torch.special.entr(probabilities).sum(-1).mean()
