"""MTSAC: soft actor-critic on several tasks at once, with a temperature per task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod import kernels
from softmod.agent import losses, surgery
from softmod.agent.chunks import Chunks
from softmod.agent.replay import Batch, Replay
from softmod.agent.running import ReturnScale, RunningMoments, SuccessRates
from softmod.agent.steps import LOG_TEMPERATURE, FlatSteps, FusedSteps, Steps, inner
from softmod.agent.update import Rollback, materialize
from softmod.agent.value_heads import ValueHead
from softmod.capture.update_graph import Update
from softmod.networks import products
from softmod.networks.gaussian import Actor
from softmod.networks.gaussian import actions as policy_actions
from softmod.networks.network import Network
from softmod.networks.stacked import StackedLinear
from softmod.networks.weights import flatten
from softmod.seeding import Purpose, torch_generator
from softmod.spec import EnvSpec, Rollout

Metrics = dict[str, Tensor]
UpdateInputs = tuple[Batch, Tensor, Tensor]  # the batch, and noise for actions and next actions
ALL = slice(None)  # all tasks
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
RECENT = 200  # newest states per task over which routes are averaged
# All threads share autocast's cache, and the first thread that leaves autocast clears it.
_autocast_cache = threading.RLock()


class MTSAC(L.LightningModule):
    """Multi-task SAC on batches `[task, batch, ...]`: a LightningModule with manual optimization.

    Args:
        spec: the tasks and sizes.
        actor: the policy, a stack of one network `obs -> 2 * action`.
        critic: a stack of two networks `obs + action -> value_head.outputs`. The target critics
            start as a copy.
        optimizers: factories for the optimizers of "actor", "critic" and "temperature".
        batch_per_task: transitions per task in an update.
        seed: the seed of all random numbers of updates.
        value_head: the interpretation of the critics' outputs.
        discount: gamma.
        target_smoothing: tau, the share of each update in the target critics.
        initial_temperature: the initial alpha of every task.
        target_entropy_per_action: the target entropy per action dimension (-1: -|A| in total).
        task_weights: "released", "paper" or "none" (difference 6; Eq. 10), or "unsolved": a task's
            weight grows with its distance from success in training.
        update_order: "sequential" (critic, then policy with the new critic, then temperature) or
            "released" (12).
        clip_norm: the largest gradient norm of the policy and of each critic (8); 0: no clipping.
        gradient_surgery: "none", or "pcgrad": conflicting components of the tasks' gradients are
            removed (Yu et al. 2020).
        n_step: steps of a transition, within its episode.
        reward_scaling: "none", or "return": rewards are divided by the size of each task's returns.
        value_scaling: "none", or "spread": the policy's values are divided by their spread within
            each task.
        policy_delay: critic updates per update of policy and temperatures.
        policy_averaging: the smoothing of an averaged policy, which acts and is evaluated (like
            `target_smoothing` for the target critics); 0: no averaged policy.

    Raises:
        ValueError: gradient surgery with networks whose tasks share no weights, or a policy delay
            in the released order.
    """

    one: Tensor  # the gradient of a loss
    indices: Tensor  # task indices
    order: Tensor  # random numbers that order the tasks in gradient surgery, for critics and actor

    def __init__(
        self,
        spec: EnvSpec,
        actor: Actor,
        critic: Network,
        optimizers: Mapping[str, MakeOptimizer],
        batch_per_task: int,
        seed: int,
        value_head: ValueHead,
        *,
        discount: float,
        target_smoothing: float,
        initial_temperature: float,
        target_entropy_per_action: float,
        task_weights: str,
        update_order: str,
        clip_norm: float,
        gradient_surgery: str,
        n_step: int,
        reward_scaling: str,
        value_scaling: str,
        policy_delay: int,
        policy_averaging: float,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec = spec
        self.batch_per_task = batch_per_task
        self.seed = seed
        self.discount = discount
        self.target_smoothing = target_smoothing
        self.clip_norm = clip_norm
        self.task_weights = task_weights
        self.update_order = update_order
        self.gradient_surgery = gradient_surgery
        if gradient_surgery != "none" and (actor.independent or critic.independent):
            name = type(actor.network).__name__
            raise ValueError(
                f"gradient_surgery={gradient_surgery}: tasks of {name} share no weights"
            )
        if policy_delay > 1 and update_order == "released":
            raise ValueError(
                "policy_delay: the released order updates policy and critics together"
                " (policy_delay=1)"
            )
        self.n_step = n_step
        self.policy_delay = policy_delay
        self.policy_averaging = policy_averaging
        self.value_scaling = value_scaling
        self.target_entropy = target_entropy_per_action * spec.action_dim
        self.value_head = value_head
        self.actor = actor
        self.critic = critic
        self.target_critic = deepcopy(critic).requires_grad_(False)
        self.averaged_actor = deepcopy(actor).requires_grad_(False) if policy_averaging else None
        self.moments = RunningMoments(spec.obs_dim) if actor.normalizer is not None else None
        self.return_scale = (
            ReturnScale(spec.num_tasks, discount, self.target_entropy)
            if reward_scaling == "return"
            else None
        )
        self.success_rates = SuccessRates(spec.num_tasks) if task_weights == "unsolved" else None
        start = torch.full((spec.num_tasks,), initial_temperature).log()
        self.log_temperature = nn.Parameter(start.clamp(-LOG_TEMPERATURE, LOG_TEMPERATURE))
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("indices", torch.arange(spec.num_tasks), persistent=False)
        self.register_buffer(
            "order", torch.zeros(2, spec.num_tasks, spec.num_tasks), persistent=False
        )
        self.make_optimizers = optimizers
        self.programs: dict[str, Update] = {"whole": self.update, "critics": self.update_critics}
        self.rollback_programs = {"whole"}  # programs that may have to undo an optimizer step
        self.fused = 0  # version of the fused operations of `softmod.kernels`; 0: none
        self.bf16 = False  # products in bfloat16, with sums and all other results in fp32
        self.given: UpdateInputs | None = None  # inputs of the last update, for fault reports
        self.updates = 0  # updates made, over all sessions
        self.skipped: Tensor | None = None  # consecutive non-finite updates, on the device
        self.chunks: Chunks | None = None  # draws on the device; None: draws of torch's generators
        self.measures = True  # False: updates return the finite flag only
        self.rollback: Rollback | None = None  # for an update's first step; made at the first use
        self.plain_steps = Steps(self)
        self.fused_steps = FusedSteps(self)
        self.flat_steps: FlatSteps | None = None  # made by `flatten`

    def describe(self) -> str:
        """Return the sizes of the networks as text for the terminal."""
        actor = self.actor.num_parameters()
        critics = self.critic.num_parameters()
        return f"actor {actor:,} parameters, critics {critics:,}"

    # --- acting -----------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        obs: Float[Tensor, "task copy obs"],
        tasks: Int[Tensor, " task"] | None = None,
        noise: Float[Tensor, "task copy action"] | None = None,
    ) -> Float[Tensor, "task copy action"]:
        """Return actions for some tasks (None: all); without noise, the deterministic actions."""
        actor = self.acting_actor
        training = actor.training
        chosen = policy_actions(actor.eval(), obs, tasks, noise)
        actor.train(training)
        return chosen

    @property
    def acting_actor(self) -> Actor:
        """Return the policy that acts and is evaluated: the averaged policy, if there is one."""
        return self.actor if self.averaged_actor is None else self.averaged_actor

    def policy(self) -> Float[Tensor, " number"]:
        """Return a flat copy of the acting policy's weights on the CPU, for workers."""
        return flatten(self.acting_actor)

    # --- learning ---------------------------------------------------------------------------------

    def observe(self, rollout: Rollout) -> None:
        """Add a round's experience to the statistics of observations, returns and success."""
        if self.return_scale is not None:
            self.return_scale.add(rollout.episodes)
        if self.success_rates is not None:
            self.success_rates.add(rollout.episodes)
        if self.moments is not None:
            self.moments.add(rollout.obs)
            for actor in (self.actor, self.averaged_actor):
                if actor is not None and actor.normalizer is not None:
                    actor.normalizer.set(self.moments.mean, self.moments.variance)

    def learn(
        self,
        replay: Replay,
        updates: int,
        stop: Callable[[], bool] = lambda: False,
        examine: bool = False,
    ) -> Metrics:
        """Make the updates of a round, without synchronising the device.

        Args:
            replay: the transitions to sample.
            updates: the number of updates.
            stop: called before each policy update, or before each chunk of updates; if it returns
                True, the remaining updates are skipped. A resumed round makes them and returns the
                metrics of an uninterrupted one.
            examine: also measure how the tasks' gradients agree on the last batch, at about the
                cost of one more update.

        Returns:
            The metrics of the last update; incomplete if `stop` ended the round.
        """
        metrics: Metrics = {}
        remaining = updates
        while remaining:
            if self.updates % self.policy_delay == 0 and stop():
                return metrics
            made = 1
            if self.chunks is None:
                latest = self.training_step(self.sample(replay), self.updates)
            else:
                latest, made = self.chunks.learn(replay, remaining)
            # Merged, because critic-only updates have no metrics of the policy.
            metrics |= latest
            remaining -= made
        return metrics | self.insight(examine) if updates else metrics

    def sample(self, replay: Replay) -> Batch:
        """Draw the batch of the next update."""
        draws = torch_generator(replay.device, self.seed, Purpose.BATCH, self.updates)
        return replay.sample(self.batch_per_task, draws, self.n_step, self.discount)

    def training_step(self, batch: Batch, batch_idx: int) -> Metrics:
        """Update critics and targets, and in every `policy_delay`-th call policy and temperatures.

        `batch_idx` is part of Lightning's interface and not used.
        """
        inputs = self.prepare(batch)
        return self.count_update(self.programs[self.program(self.updates)](*inputs))

    def prepare(self, batch: Batch) -> UpdateInputs:
        """Draw the random numbers of the next update; return its inputs."""
        draws = torch_generator(batch.obs.device, self.seed, Purpose.UPDATE, self.updates)
        noise = torch.randn((2, *batch.action.shape), generator=draws, device=batch.action.device)
        self.draw()
        inputs = Batch(*batch), noise[0], noise[1]
        self.given = inputs
        return inputs

    def next_inputs(self, replay: Replay, remaining: int) -> UpdateInputs:
        """Draw the inputs of the next update, the first of `remaining` in this round."""
        if self.chunks is None:
            return self.prepare(self.sample(replay))
        self.given = self.chunks.next_inputs(replay, remaining)
        return self.given

    def last_given(self) -> UpdateInputs:
        """Return the inputs of the last update.

        Raises:
            RuntimeError: no update was made yet.
        """
        if self.given is None:
            raise RuntimeError("no update was made yet")
        return self.given

    def count_update(self, metrics: Metrics) -> Metrics:
        """Count an update; return its metrics with the number of consecutive non-finite updates."""
        self.updates += 1
        before = (
            torch.zeros((), device=metrics["finite"].device)
            if self.skipped is None
            else self.skipped
        )
        self.skipped = torch.where(metrics["finite"], 0.0, before + 1.0)
        return metrics | {"skipped_in_a_row": self.skipped}

    def skipped_in_a_row(self) -> int:
        """Return the number of consecutive non-finite updates; waits for the device."""
        return 0 if self.skipped is None else int(self.skipped)

    def insight(self, examine: bool) -> Metrics:
        """Measure routing entropies and, with `examine`, gradient agreement on the last batch."""
        batch, _, _ = self.last_given()
        agreement = self.gradient_agreement() if examine else {}
        return self.routing_entropies(batch.obs) | agreement

    def program(self, number: int) -> str:
        """Return the name of the program for update `number`, counted from 0."""
        return "critics" if number % self.policy_delay else "whole"

    def draw(self) -> None:
        """Draw the random numbers inside networks, and the task order of gradient surgery."""
        if self.chunks is not None:
            self.draw_from(self.chunks.inside())
            return
        draws = torch_generator(self.order.device, self.seed, Purpose.INSIDE, self.updates)
        for network in (self.actor, self.critic, self.target_critic):
            network.draw(self.batch_per_task, draws)
        if self.gradient_surgery != "none":
            self.order.uniform_(generator=draws)

    def random_words(self) -> int:
        """Return the number of random words that `draw_from` uses."""
        networks = (self.actor, self.critic, self.target_critic)
        order = 0 if self.gradient_surgery == "none" else self.order.numel()
        return sum(network.random_words(self.batch_per_task) for network in networks) + order

    def draw_from(self, words: Int[Tensor, " word"]) -> None:
        """Draw what `draw` does, in place, from random words (see `softmod.counter`)."""
        for network in (self.actor, self.critic, self.target_critic):
            number = network.random_words(self.batch_per_task)
            network.draw_from(self.batch_per_task, words[:number])
            words = words[number:]
        if self.gradient_surgery != "none":
            self.order.copy_((words >> 8).view_as(self.order))  # 24 bits are exact in fp32

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of actor, critics and temperatures, with initialized state."""
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
        """Update all networks and temperatures from tensors on one device.

        The result depends only on the inputs and the agent's state. Nothing waits for the device.

        Args:
            batch: the transitions `[task, batch, ...]`.
            noise: standard normal noise of the policy's actions `[task, batch, action]`.
            next_noise: the same for the actions in the next states.
        """
        with self._numerics(), self._halves():
            batch = self._as_learned(batch)
            if self.update_order == "released":
                return self._update_released(batch, noise, next_noise)
            return self._update_sequential(batch, noise, next_noise)

    def update_critics(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """Update critics and targets only (see `update`); `noise` is not used.

        The finite flag is known before the only step, so no rollback is needed.
        """
        with self._numerics(), self._halves():
            batch = self._as_learned(batch)
            temperature, weight = self._temperature_and_weight()
            losses, norms = self._critic_gradient(batch, next_noise, temperature, weight)
            finite = self.steps.finite(losses, norms)
            self.steps.critics(finite, norms)
            return self._critic_metrics(losses, norms, finite)

    def _as_learned(self, batch: Batch) -> Batch:
        """Return the batch with normalized observations and scaled rewards.

        Reward scaling uses the temperatures before the update.
        """
        reward = batch.reward
        if self.return_scale is not None:
            reward = self.return_scale(reward, self.log_temperature.detach().exp())
        obs = self.actor.normalize(batch.obs)
        next_obs = self.actor.normalize(batch.next_obs)
        return Batch(obs, batch.action, reward, next_obs, batch.discount)

    def _update_sequential(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """Update critics, then the policy with the new critics, then temperatures.

        If any loss or gradient is not finite, nothing changes.
        """
        steps = self.steps
        temperature, weight = self._temperature_and_weight()

        critic_losses, critic_norms = self._critic_gradient(batch, next_noise, temperature, weight)
        finite = steps.finite(critic_losses, critic_norms)
        steps.try_critics(finite, critic_norms)

        actor_loss, actor_norm, log_prob = self._actor_gradient(batch, noise, temperature, weight)
        temperature_loss = self._temperature_gradient(log_prob)
        finite = steps.finite(actor_loss, actor_norm, temperature_loss, also=finite)
        steps.actor(finite, actor_norm)
        steps.temperatures(finite)
        steps.settle_critics(finite)
        return self._critic_metrics(critic_losses, critic_norms, finite) | self._policy_metrics(
            actor_loss, actor_norm, temperature_loss, weight
        )

    def _update_released(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Metrics:
        """Update temperatures first, then critics and policy, with losses at the old networks (12).

        The losses use the new temperatures. If any of them is not finite, nothing changes.
        """
        steps = self.steps
        with torch.no_grad():
            _, log_prob = self.actor.sample(batch.obs, noise)
        temperature_loss = self._temperature_gradient(log_prob)
        finite = steps.finite(temperature_loss)
        steps.try_temperatures(finite)

        temperature, weight = self._temperature_and_weight()
        critic_losses, critic_norms = self._critic_gradient(batch, next_noise, temperature, weight)
        actor_loss, actor_norm, _ = self._actor_gradient(batch, noise, temperature, weight)
        finite = steps.finite(critic_losses, critic_norms, actor_loss, actor_norm, also=finite)
        steps.critics(finite, critic_norms)
        steps.actor(finite, actor_norm)
        steps.settle_temperatures(finite)
        return self._critic_metrics(critic_losses, critic_norms, finite) | self._policy_metrics(
            actor_loss, actor_norm, temperature_loss, weight
        )

    # --- the parts of an update -------------------------------------------------------------------

    def _temperature_and_weight(self) -> tuple[Tensor, Tensor]:
        log_temperature = self.log_temperature.detach()
        if self.success_rates is not None:
            return log_temperature.exp(), losses.distance_weights(self.success_rates.rates)
        return log_temperature.exp(), losses.task_weights(log_temperature, self.task_weights)

    def _critic_gradient(
        self, batch: Batch, next_noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the clipped gradient of the critics; return their losses and norms `[critic]`."""
        loss = self._critic_loss(batch, next_noise, temperature, weight)
        value, norms, _ = self._gradient(loss, self.critic, self.order[0])
        return value, norms

    def _actor_gradient(
        self, batch: Batch, noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the clipped gradient of the policy; the critics' parameters get none.

        Returns:
            The loss, the gradient norm, and the log-probabilities `[task, batch]`.
        """
        loss = self._actor_loss(batch, noise, temperature, weight)
        with frozen(self.critic):
            value, norm, log_prob = self._gradient(loss, self.actor, self.order[1])
        assert log_prob is not None
        return value, norm, log_prob

    def _critic_loss(
        self, batch: Batch, next_noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> surgery.Loss:
        """Return the critics' losses `[critic]` as a function of a slice of tasks."""
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(batch.next_obs, next_noise)
            next_outputs = _outputs(self.target_critic, batch.next_obs, next_action)
            next_entropy = -(temperature[:, None] * next_log_prob)
            target = self.value_head.target(
                batch.reward, batch.discount, next_outputs, next_entropy
            )

        def loss(tasks: slice) -> tuple[Tensor, None]:
            outputs = _outputs(
                self.critic, batch.obs[tasks], batch.action[tasks], self._indices(tasks)
            )
            return self.value_head.loss(outputs, target[tasks], weight[tasks]), None

        return loss

    def _actor_loss(
        self, batch: Batch, noise: Tensor, temperature: Tensor, weight: Tensor
    ) -> surgery.Loss:
        """Return the policy's loss and log-probabilities as a function of a slice of tasks."""

        def loss(tasks: slice) -> tuple[Tensor, Tensor]:
            obs = batch.obs[tasks]
            indices = self._indices(tasks)
            action, log_prob = self.actor.sample(obs, noise[tasks], indices)
            value = self.value_head.value(_outputs(self.critic, obs, action, indices))
            scaled = self.value_scaling == "spread"
            actor_loss = losses.policy_loss(
                value, log_prob, temperature[tasks], weight[tasks], scaled
            )
            return actor_loss, log_prob.detach()

        return loss

    def _indices(self, tasks: slice) -> Tensor | None:
        return None if tasks == ALL else self.indices[tasks]

    def _gradient(
        self, loss: surgery.Loss, network: Network, order: Tensor
    ) -> tuple[Tensor, Tensor, surgery.Aux]:
        """Write the gradient of a loss, clipped per member, to the network's parameters.

        If the tasks share no weights, each task is an agent of its own: losses are summed over
        tasks, and each task's gradient is clipped separately.

        Returns:
            The loss, the gradient norm of each member, and the loss function's second output.
        """
        network.zero_grad()
        if self.gradient_surgery == "none":
            value, aux = loss(ALL)
            if not self.steps.clips and not network.independent:
                ones = self.one.expand(value.shape) if value.dim() else self.one[0]
                self.manual_backward(value, ones)
            else:
                self.manual_backward(
                    value.sum() * self.spec.num_tasks if network.independent else value.sum()
                )
        else:
            values, gradients, aux = surgery.task_gradients(loss, network, self.spec.num_tasks)
            surgery.set_gradient(network, surgery.pcgrad(gradients, order))
            value = values.mean(0)
        norms = self.steps.norms(network)
        return value.detach(), norms, aux

    def _temperature_gradient(self, log_prob: Tensor) -> Tensor:
        self.log_temperature.grad = None
        loss = losses.temperature_loss(self.log_temperature, log_prob, self.target_entropy)
        if not self.steps.clips:
            self.manual_backward(loss, self.one[0])
        else:
            self.manual_backward(loss)
        return loss.detach()

    @property
    def steps(self) -> Steps:
        """Return the way in which optimizer steps are made: fused, where kernels support them."""
        if self.flat_steps is not None:
            return self.flat_steps
        fused = self.fabric is not None and all(
            kernels.optimizer.supports(inner(optimizer)) for optimizer in self.own_optimizers()
        )
        return self.fused_steps if fused else self.plain_steps

    def flatten(self, optimizers: Sequence[torch.optim.Optimizer], triton: bool) -> None:
        """Make the steps on flat buffers from now on, if the optimizers support it.

        Args:
            optimizers: as returned by `configure_optimizers`; all parameters are on the device.
            triton: whether Triton kernels make the steps; otherwise tensor arithmetic does.
        """
        if all(map(kernels.flat.supports, optimizers)):
            self.flat_steps = FlatSteps(self, optimizers, triton)

    def own_optimizers(self) -> tuple[Any, Any, Any]:
        """Return the optimizers of actor, critics and temperatures, as wrapped by Lightning."""
        actor, critic, temperature = self.optimizers()  # type: ignore[attr-defined]
        return actor, critic, temperature

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """Compute in Fabric's precision, with fused operations if `self.fused`.

        A Lightning Trainer sets the precision itself.
        """
        precision = nullcontext() if self.fabric is None else self.fabric.autocast()
        version = 0 if self.bf16 else self.fused
        with _autocast_cache, precision, kernels.used(version):
            yield

    @contextmanager
    def _halves(self) -> Iterator[None]:
        """Multiply bfloat16 copies of the weights, with `bf16` or if steps are fused in autocast.

        Under autocast, gradient surgery needs the gradients of the weights themselves.
        """
        wanted = (
            self.gradient_surgery == "none"
            and self.steps is self.fused_steps
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") is torch.bfloat16
        )
        copies = self.steps.copies() if self.bf16 else None
        with products.in_bf16(copies), kernels.halves(wanted):
            for network in (self.actor, self.critic, self.target_critic):
                kernels.halve(_products(network))
            yield

    # --- metrics ----------------------------------------------------------------------------------

    def _critic_metrics(self, losses: Tensor, norms: Tensor, finite: Tensor) -> Metrics:
        """Return the critics' metrics and the finite flag, as tensors on the device."""
        if not self.measures:
            return {"finite": finite}
        return {
            "critic_loss": losses.mean(),
            "critic_gradient_norm": norms.mean(),
            "finite": finite,
        }

    def _policy_metrics(
        self, loss: Tensor, norm: Tensor, temperature_loss: Tensor, weight: Tensor
    ) -> Metrics:
        """Return the policy's metrics on the device; temperatures and weights are `[task]`."""
        if not self.measures:
            return {}
        return {
            "actor_loss": loss,
            "actor_gradient_norm": norm.mean(),
            "temperature_loss": temperature_loss,
            "temperature": self.log_temperature.detach().exp(),
            "task_weight": weight,
        }

    @torch.no_grad()
    def routing_entropies(self, obs: Float[Tensor, "task batch obs"]) -> Metrics:
        """Return the mean entropy of each of the actor's routing layers in nats, `[layer]`.

        The result is empty for networks without routing.
        """
        routes = self.actor.routing(obs)
        if not routes:
            return {}
        return {"routing_entropy": torch.stack([entropy(route) for route in routes])}

    @torch.no_grad()
    def routes(self, replay: Replay) -> list[Float[Tensor, "task target source"]]:
        """Return the acting policy's routing probabilities per layer, averaged over recent states.

        The list is empty for networks without routing and for an empty replay.
        """
        if not replay.size:
            return []
        actor = self.acting_actor
        training = actor.training
        routes = actor.eval().routing(replay.newest(RECENT))
        actor.train(training)
        return [route[0].mean(1) for route in routes]

    def gradient_agreement(self) -> Metrics:
        """Measure how the tasks' gradients of actor and critic agree on the last batch.

        The metrics are those of `surgery.agreement`. The result is empty for a single task and for
        networks whose tasks share no weights.
        """
        if self.spec.num_tasks < 2 or self.actor.independent or self.critic.independent:
            return {}
        batch, noise, next_noise = self.last_given()
        temperature, weight = self._temperature_and_weight()
        with self._numerics():
            batch = self._as_learned(batch)
            of = {
                "actor": (self._actor_loss(batch, noise, temperature, weight), self.actor),
                "critic": (self._critic_loss(batch, next_noise, temperature, weight), self.critic),
            }
            metrics: Metrics = {}
            for name, (loss, network) in of.items():
                _, gradients, _ = surgery.task_gradients(loss, network, self.spec.num_tasks)
                for key, value in surgery.agreement(surgery.cosines(gradients)).items():
                    metrics[f"gradients/{key}/{name}"] = value
        return metrics


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradients flow through a network without accumulating on its parameters."""
    parameters = list(network.parameters())
    network.requires_grad_(False)
    kernels.follow(parameters)
    try:
        yield
    finally:
        network.requires_grad_(True)
        kernels.follow(parameters)


def _products(network: nn.Module) -> list[Tensor]:
    """Return the weights and biases of a network's stacked layers."""
    layers = [module for module in network.modules() if isinstance(module, StackedLinear)]
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _outputs(critic: Network, obs: Tensor, action: Tensor, tasks: Tensor | None = None) -> Tensor:
    """Return the critics' outputs `[critic, task, batch, out]` for normalized observations."""
    outputs: Tensor = critic(torch.cat([obs, action], -1), tasks)
    return outputs


def entropy(probabilities: Float[Tensor, "*batch source"]) -> Float[Tensor, ""]:
    """Return the mean entropy of distributions over sources, in nats."""
    return torch.special.entr(probabilities).sum(-1).mean()
