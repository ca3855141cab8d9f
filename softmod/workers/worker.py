"""The process's side: the environments of some tasks, stepped with a frozen policy."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from softmod.capture.numpy_graph import Repeated, repeated
from softmod.errors import PhysicsError, SoftmodError, WorkerError
from softmod.networks.gaussian import Actor, actions
from softmod.seeding import Purpose, generator, pink
from softmod.spec import EnvSpec, Episode, Fault, Floats, Rollout, TaskEnv, TaskSuite
from softmod.system import signals

State = dict[str, NDArray[Any]]
MOST_IN_A_ROW = 5  # episodes whose first step breaks the physics


@dataclass(frozen=True)
class Plan:
    """What every worker of a run is told once.

    `draw_goals`: goals are drawn anew for each episode. `pink_noise`: an episode's exploration is
    correlated in time.
    """

    suite: TaskSuite
    actor: Actor
    seed: int
    draw_goals: bool = False
    pink_noise: bool = False


class Lane:
    """One environment and the episode under way in it; goal and noise are keyed by (task, copy,
    episode).
    """

    def __init__(self, plan: Plan, task: int, copy: int) -> None:
        self.plan, self.task, self.copy = plan, task, copy
        self.spec: EnvSpec = plan.suite.spec
        self.env: TaskEnv = plan.suite.make(task)
        self.goals = None if plan.draw_goals else plan.suite.goals(task)
        self.actions = np.zeros((self.spec.episode_steps, self.spec.action_dim), np.float32)
        self.episode = -1
        self.steps = self.spec.episode_steps
        self.rewards: list[float] = []

    def begin(self, episode: int) -> None:
        """Reset to the episode's own goal."""
        address = (self.plan.seed, Purpose.GOAL, self.task, self.copy, episode)
        draws = generator(*address)
        goal = (
            self.env.draw_goal(draws)
            if self.goals is None
            else self.goals[draws.integers(len(self.goals))]
        )
        noise = generator(self.plan.seed, Purpose.EXPLORATION, self.task, self.copy, episode)
        white = noise.standard_normal(self.actions.shape, np.float32)
        self.noise = pink(white) if self.plan.pink_noise else white
        self.obs = self.env.reset(goal)
        self.actions[:] = 0.0
        self.episode, self.steps, self.rewards, self.success = episode, 0, [], False

    def ready(self) -> None:
        """Begin the next episode if the last one is over."""
        if self.steps == self.spec.episode_steps:
            self.begin(self.episode + 1)

    def step(self, action: Floats) -> float:
        """Act; the reward."""
        self.actions[self.steps] = action
        self.obs, reward, success = self.env.step(action)
        self.rewards.append(reward)
        self.steps, self.success = self.steps + 1, self.success or success
        return reward

    def ended(self) -> Episode:
        """The episode, after its last step."""
        rewards = tuple(self.rewards)
        return Episode(self.task, self.copy, self.episode, sum(rewards), self.success, rewards)

    def resume(self, episode: int, actions: Floats, obs: Floats) -> None:
        """Re-execute an episode's actions, and check that they lead to the same observation.

        Raises:
            WorkerError: they do not.
        """
        self.begin(episode)
        for action in actions:
            self.step(action)
        if not np.array_equal(np.asarray(self.obs, np.float32), obs):
            name = self.spec.tasks[self.task]
            raise WorkerError(
                f"{name}: re-executing episode {episode} did not lead to the same observation"
            )


def bind(actor: Actor, weights: Floats) -> None:
    """Make a network's weights views of a flat array, in the order of its state dict: who writes
    there, loads it.
    """
    offset = 0
    for tensor in actor.state_dict(keep_vars=True).values():
        tensor.data = torch.from_numpy(weights[offset : offset + tensor.numel()]).view(tensor.shape)
        offset += tensor.numel()


class Collector:
    """The environments of `tasks x copies`, and others for evaluation; the policy they act with.

    `weights` is the flat array that the policy's weights lie in; None leaves it with the plan's
    own.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: list[int],
        copies: list[int],
        training: bool = True,
        weights: Floats | None = None,
    ) -> None:
        self.plan, self.spec = plan, plan.suite.spec
        self.actor = plan.actor.eval().requires_grad_(False)
        if weights is not None:
            bind(self.actor, weights)
        self.tasks, self.copies = torch.tensor(tasks), copies
        self.lanes = (
            [[Lane(plan, task, copy) for copy in copies] for task in tasks] if training else []
        )
        self.places = [
            (i, j, lane) for i, row in enumerate(self.lanes) for j, lane in enumerate(row)
        ]
        self.judges: list[TaskEnv] = []

    # Recorded at their first use, when there are weights to check them with.

    @cached_property
    def explore(self) -> Repeated:
        """Actions `[task, copy, action]` from its inputs: observations and noise of every lane."""
        rows = len(self.tasks), len(self.copies)
        inputs = [torch.zeros(*rows, self.spec.obs_dim), torch.zeros(*rows, self.spec.action_dim)]
        return repeated(lambda obs, noise: actions(self.actor, obs, self.tasks, noise), inputs)

    @cached_property
    def exploit(self) -> Repeated:
        """Deterministic actions `[task, 1, action]` of all tasks, from their observations."""
        return repeated(
            partial(actions, self.actor), [torch.zeros(self.spec.num_tasks, 1, self.spec.obs_dim)]
        )

    def collect(self, steps: int, uniform: bool = False) -> Rollout:
        """Take `steps` in every environment, exploring, or with uniform actions: `[task, copy,
        step, ...]`.
        """
        began = time.monotonic()
        shape = (len(self.tasks), len(self.copies), steps)
        rollout = Rollout(
            np.empty((*shape, self.spec.obs_dim), np.float32),
            np.empty((*shape, self.spec.action_dim), np.float32),
            np.empty(shape, np.float32),
            np.empty((*shape, self.spec.obs_dim), np.float32),
            np.zeros(shape, bool),
        )
        act = self._uniform if uniform else self.explore
        for step in range(steps):
            self._step(rollout, step, act)
        rollout.seconds = time.monotonic() - began
        return rollout

    def _uniform(self) -> Floats:
        """Actions uniform in [-1, 1], made of the episodes' own normal noise."""
        _, noise = self.explore.inputs
        return (2.0 * ndtr(noise) - 1.0).astype(np.float32)

    def _step(self, rollout: Rollout, step: int, act: Callable[[], Floats]) -> None:
        """One step of every lane, acting for all of them at once."""
        obs, noise = self.explore.inputs
        for i, j, lane in self.places:
            lane.ready()
            obs[i, j] = lane.obs
            noise[i, j] = lane.noise[lane.steps]
            rollout.begins[i, j, step] = lane.steps == 0
        rollout.obs[:, :, step], rollout.action[:, :, step] = obs, act()
        actions = rollout.action[:, :, step]
        for i, j, lane in self.places:
            try:
                rollout.reward[i, j, step] = lane.step(actions[i, j])
            except PhysicsError as error:
                rollout.reward[i, j, step] = self._begin_anew(
                    rollout, (i, j, step), lane, act, error
                )
            rollout.next_obs[i, j, step] = lane.obs
            if lane.steps == self.spec.episode_steps:
                rollout.episodes.append(lane.ended())

    def _begin_anew(
        self,
        rollout: Rollout,
        at: tuple[int, int, int],
        lane: Lane,
        act: Callable[[], Floats],
        error: PhysicsError,
    ) -> float:
        """In place of a step that broke the physics, the first one of the next episode; its reward.

        Raises:
            PhysicsError: that one broke as well, and so did those after it.
        """
        obs, noise = self.explore.inputs
        for _ in range(MOST_IN_A_ROW):
            rollout.faults.append(Fault(lane.task, lane.copy, lane.episode, at[2]))
            lane.begin(lane.episode + 1)
            obs[at[:2]], noise[at[:2]] = lane.obs, lane.noise[0]
            rollout.obs[at], rollout.action[at], rollout.begins[at] = lane.obs, act()[at[:2]], True
            try:
                return lane.step(rollout.action[at])
            except PhysicsError as again:
                error = again
        raise error

    def evaluate(self, goals: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """The deterministic policy on these goals of every task: success and return `[task, goal]`.

        An episode ends at success, or where its physics breaks. Actions are always computed for all
        tasks, one environment each, so that the result does not depend on how goals are spread over
        workers.

        Raises:
            StoppedError: this process, which is no worker's then, was told to stop.
        """
        self.judges = self.judges or [
            self.plan.suite.make(task) for task in range(self.spec.num_tasks)
        ]
        success = np.zeros((self.spec.num_tasks, len(goals)), bool)
        returns = np.zeros((self.spec.num_tasks, len(goals)))
        (obs,) = self.exploit.inputs
        turn, steps = [0] * self.spec.num_tasks, [0] * self.spec.num_tasks
        while running := [task for task in range(self.spec.num_tasks) if turn[task] < len(goals)]:
            for task in running:
                if steps[task] == 0:
                    obs[task, 0] = self.judges[task].reset(
                        self.plan.suite.goals(task)[goals[turn[task]]]
                    )
            if signals.stopping():
                raise signals.StoppedError
            actions = self.exploit()
            for task in running:
                try:
                    obs[task, 0], reward, reached = self.judges[task].step(actions[task, 0])
                except PhysicsError:  # an episode without success
                    turn[task], steps[task] = turn[task] + 1, 0
                    continue
                returns[task, turn[task]] += reward
                success[task, turn[task]] |= reached
                steps[task] += 1
                if reached or steps[task] == self.spec.horizon:
                    turn[task], steps[task] = turn[task] + 1, 0
        return success, returns

    def restore(self, state: State) -> None:
        """Bring every environment to where `state` was taken."""
        for i, row in enumerate(self.lanes):
            for j, lane in enumerate(row):
                episode, steps = int(state["episode"][i, j]), int(state["steps"][i, j])
                if steps == self.spec.episode_steps:  # over, or none yet
                    lane.episode, lane.steps, lane.obs = episode, steps, state["obs"][i, j]
                    lane.actions[:] = state["actions"][i, j]
                else:
                    lane.resume(episode, state["actions"][i, j, :steps], state["obs"][i, j])

    def close(self) -> None:
        for env in [*(lane.env for row in self.lanes for lane in row), *self.judges]:
            env.close()


def serve(
    plan: Plan,
    tasks: list[int],
    copies: list[int],
    training: bool,
    weights: Any,
    connection: Connection,
) -> None:
    """A worker process: builds its environments, then answers (number, method, arguments) until
    told to close.

    `weights` is shared memory that the policy's weights lie in.
    """
    for number in (signal.SIGINT, *signals.STOPS):  # the learner's to handle
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the learner is gone
        try:
            collector = Collector(plan, tasks, copies, training, np.frombuffer(weights, np.float32))
        except Exception as error:
            connection.send((0, "error", describe(error)))
            return
        # what was imported and built stays; looking it all through takes a fifth of a second each
        # time
        gc.freeze()
        try:
            connection.send((0, "ready", None))
            _answer(collector, connection)
        finally:
            collector.close()


def _answer(collector: Collector, connection: Connection) -> None:
    while True:
        number, method, arguments = connection.recv()
        if method == "close":
            return
        try:
            connection.send((number, "done", getattr(collector, method)(*arguments)))
        except PhysicsError as error:
            connection.send((number, "physics", describe(error)))
        except Exception as error:
            connection.send((number, "error", describe(error)))


def describe(error: BaseException) -> str:
    return str(error) if isinstance(error, SoftmodError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """No worker outlives its learner, however that one ends."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
