"""The worker's side: the environments of some tasks, stepped with a frozen policy."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.heap import Arena

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from softmod.capture.numpy_graph import NumpyFunction, record
from softmod.envs.episode import EvalEpisode
from softmod.errors import PhysicsError, SoftmodError, WorkerError
from softmod.networks.gaussian import Actor, actions
from softmod.networks.weights import bind
from softmod.seeding import Purpose, generator, pink
from softmod.spec import EnvSpec, Episode, Fault, Floats, Rollout, TaskEnv, TaskSuite, UnderWay
from softmod.system import signals
from softmod.workers.memory import weights_in

MOST_IN_A_ROW = 5  # most consecutive episodes with a physics error in their first step


@dataclass(frozen=True)
class Plan:
    """The settings that all workers share.

    Args:
        suite: the task set.
        actor: the policy; its weights change each round.
        seed: the run's seed.
        draw_goals: draw a new goal for each episode, instead of one of the task's goals.
        pink_noise: explore with pink noise over an episode's steps, instead of white noise.
    """

    suite: TaskSuite
    actor: Actor
    seed: int
    draw_goals: bool = False
    pink_noise: bool = False


class EnvSlot:
    """An environment and its current training episode.

    Goal and noise are keyed by (seed, task, copy, episode).
    """

    def __init__(self, plan: Plan, task: int, copy: int) -> None:
        self.plan = plan
        self.task = task
        self.copy = copy
        self.spec: EnvSpec = plan.suite.spec
        self.env: TaskEnv = plan.suite.make(task)
        self.goals = None if plan.draw_goals else plan.suite.goals(task)
        self.actions = np.zeros((self.spec.episode_steps, self.spec.action_dim), np.float32)
        self.noise = np.zeros_like(self.actions)
        self.obs = np.zeros(self.spec.obs_dim, np.float32)
        self.episode = -1
        self.steps = self.spec.episode_steps  # so that the first step begins an episode
        self.rewards: list[float] = []
        self.success = False

    def begin(self, episode: int) -> None:
        """Start an episode: draw its goal and noise, and reset the environment."""
        draws = generator(self.plan.seed, Purpose.GOAL, self.task, self.copy, episode)
        if self.goals is None:
            goal = self.env.draw_goal(draws)
        else:
            goal = self.goals[draws.integers(len(self.goals))]
        noise = generator(self.plan.seed, Purpose.EXPLORATION, self.task, self.copy, episode)
        white = noise.standard_normal(self.actions.shape, np.float32)
        self.noise = pink(white) if self.plan.pink_noise else white
        self.obs = self.env.reset(goal)
        self.actions[:] = 0.0
        self.episode = episode
        self.steps = 0
        self.rewards = []
        self.success = False

    @property
    def over(self) -> bool:
        """Return whether all steps of the episode are taken."""
        return self.steps == self.spec.episode_steps

    def step(self, action: Floats) -> float:
        """Apply an action; return the reward."""
        self.actions[self.steps] = action
        self.obs, reward, success = self.env.step(action)
        self.rewards.append(reward)
        self.steps += 1
        self.success = self.success or success
        return reward

    def ended(self) -> Episode:
        """Return the finished episode."""
        rewards = tuple(self.rewards)
        return Episode(self.task, self.copy, self.episode, sum(rewards), self.success, rewards)

    def restore(self, episode: int, steps: int, actions: Floats, obs: Floats) -> None:
        """Re-execute the first steps of an episode and check the resulting observation.

        A finished episode is not executed; its values are only stored.

        Raises:
            WorkerError: the observation differs.
        """
        if steps == self.spec.episode_steps:
            self.episode = episode
            self.steps = steps
            self.obs = obs
            self.actions[:] = actions
            return
        self.begin(episode)
        for action in actions[:steps]:
            self.step(action)
        if not np.array_equal(np.asarray(self.obs, np.float32), obs):
            name = self.spec.tasks[self.task]
            raise WorkerError(
                f"{name}: re-executing episode {episode} did not lead to the same observation"
            )


class Collector:
    """The environments of `tasks x copies`, separate eval envs, and the policy that acts in them.

    Args:
        plan: the task set, the policy and the run's seed.
        tasks: task indices.
        copies: indices of the copies of each task.
        training: whether to build training environments; `evaluate` needs none.
        weights: a flat array with the policy's weights; None: those of `plan.actor`.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: list[int],
        copies: list[int],
        training: bool = True,
        weights: Floats | None = None,
    ) -> None:
        self.plan = plan
        self.spec = plan.suite.spec
        self.actor = plan.actor.eval().requires_grad_(False)
        if weights is not None:
            bind(self.actor, weights)
        self.tasks = torch.tensor(tasks)
        self.copies = copies
        self.slots: dict[tuple[int, int], EnvSlot] = {}  # by position in `tasks` and `copies`
        if training:
            for at in np.ndindex(len(tasks), len(copies)):
                self.slots[at] = EnvSlot(plan, tasks[at[0]], copies[at[1]])
        self.eval_envs: list[TaskEnv] = []

    # Recorded at their first use, since the check of a recording needs the policy's weights.

    @cached_property
    def explore(self) -> NumpyFunction:
        """Return the function from observations and noise of all slots to actions.

        Shapes are `[task, copy, ...]`.
        """
        rows = len(self.tasks), len(self.copies)
        inputs = [torch.zeros(*rows, self.spec.obs_dim), torch.zeros(*rows, self.spec.action_dim)]
        return record(lambda obs, noise: actions(self.actor, obs, self.tasks, noise), inputs)

    @cached_property
    def exploit(self) -> NumpyFunction:
        """Return the function from observations of all tasks to deterministic actions.

        Shapes are `[task, 1, ...]`.
        """
        inputs = [torch.zeros(self.spec.num_tasks, 1, self.spec.obs_dim)]
        return record(partial(actions, self.actor), inputs)

    def collect(self, steps: int, uniform: bool = False) -> Rollout:
        """Take `steps` steps in every environment; return the rollout `[task, copy, step, ...]`.

        Actions are the policy's with exploration noise, or uniform in [-1, 1].
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
        rollout.under_way = self._under_way()
        rollout.seconds = time.monotonic() - began
        return rollout

    def _uniform(self) -> Floats:
        """Return actions uniform in [-1, 1], computed from the episodes' normal noise."""
        _, noise = self.explore.inputs
        return (2.0 * ndtr(noise) - 1.0).astype(np.float32)

    def _step(self, rollout: Rollout, step: int, act: Callable[[], Floats]) -> None:
        """Take one step in every slot, with one batched action of the policy."""
        obs, noise = self.explore.inputs
        for at, slot in self.slots.items():
            if slot.over:
                slot.begin(slot.episode + 1)
            obs[at] = slot.obs
            noise[at] = slot.noise[slot.steps]
            rollout.begins[*at, step] = slot.steps == 0
        rollout.obs[:, :, step] = obs
        rollout.action[:, :, step] = act()
        for at, slot in self.slots.items():
            try:
                reward = slot.step(rollout.action[*at, step])
            except PhysicsError as error:
                reward = self._begin_anew(rollout, (*at, step), slot, act, error)
            rollout.reward[*at, step] = reward
            rollout.next_obs[*at, step] = slot.obs
            if slot.over:
                rollout.episodes.append(slot.ended())

    def _begin_anew(
        self,
        rollout: Rollout,
        at: tuple[int, int, int],
        slot: EnvSlot,
        act: Callable[[], Floats],
        error: PhysicsError,
    ) -> float:
        """Replace a step with a physics error by the first step of the next episode.

        Returns:
            The reward of that step.

        Raises:
            PhysicsError: the first steps of `MOST_IN_A_ROW` episodes failed as well.
        """
        obs, noise = self.explore.inputs
        for _ in range(MOST_IN_A_ROW):
            rollout.faults.append(Fault(slot.task, slot.copy, slot.episode, at[2]))
            slot.begin(slot.episode + 1)
            obs[at[:2]] = slot.obs
            noise[at[:2]] = slot.noise[0]
            rollout.obs[at] = slot.obs
            rollout.action[at] = act()[at[:2]]
            rollout.begins[at] = True
            try:
                return slot.step(rollout.action[at])
            except PhysicsError as latest:
                error = latest
        raise error

    def _under_way(self) -> UnderWay:
        """Return a copy of the unfinished episodes."""
        under_way = UnderWay.none(self.spec, len(self.tasks), len(self.copies))
        for at, slot in self.slots.items():
            under_way.episode[at] = slot.episode
            under_way.steps[at] = slot.steps
            under_way.actions[at] = slot.actions
            under_way.obs[at] = slot.obs
        return under_way

    def evaluate(self, goals: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Evaluate the deterministic policy on the goals of every task with these indices.

        Actions are always computed for all tasks, with one environment each, so the results do not
        depend on the assignment of goals to workers.

        Returns:
            Success and episode return, `[task, goal]`.

        Raises:
            StoppedError: a signal stopped the run; worker processes ignore signals.
        """
        tasks = range(self.spec.num_tasks)
        self.eval_envs = self.eval_envs or [self.plan.suite.make(task) for task in tasks]
        success = np.zeros((self.spec.num_tasks, len(goals)), bool)
        returns = np.zeros((self.spec.num_tasks, len(goals)))
        waiting = {task: deque(range(len(goals))) for task in tasks}  # positions in `goals`
        running: dict[int, tuple[int, EvalEpisode]] = {}
        (obs,) = self.exploit.inputs
        while True:
            for task in tasks:
                if task not in running and waiting[task]:
                    position = waiting[task].popleft()
                    running[task] = position, self._episode(task, goals[position])
            if not running:
                return success, returns
            if signals.stopping():
                raise signals.StoppedError
            for task, (_, episode) in running.items():
                obs[task, 0] = episode.obs
            actions = self.exploit()
            for task, (position, episode) in list(running.items()):
                episode.step(actions[task, 0])
                if episode.over:
                    success[task, position] = episode.success
                    returns[task, position] = episode.episode_return
                    del running[task]

    def _episode(self, task: int, goal: int) -> EvalEpisode:
        goals = self.plan.suite.goals(task)
        return EvalEpisode(self.eval_envs[task], goals[goal], self.spec.horizon)

    def restore(self, under_way: UnderWay) -> None:
        """Re-execute the unfinished episode of every environment."""
        for at, slot in self.slots.items():
            episode = int(under_way.episode[at])
            steps = int(under_way.steps[at])
            slot.restore(episode, steps, under_way.actions[at], under_way.obs[at])

    def close(self) -> None:
        """Close all environments."""
        for env in [*(slot.env for slot in self.slots.values()), *self.eval_envs]:
            env.close()


def serve(
    packed: bytes,
    tasks: list[int],
    copies: list[int],
    training: bool,
    weights: Arena,
    connection: Connection,
) -> None:
    """Run a worker process: build its environments, then serve requests until `close`.

    Requests are `(number, method, arguments)`. `packed` is the pickled plan, `weights` the shared
    memory of the policy's weights.
    """
    for number in (signal.SIGINT, *signals.STOPS):  # only the learner handles signals
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the learner is gone
        try:
            plan: Plan = pickle.loads(packed)
            collector = Collector(plan, tasks, copies, training, weights_in(weights))
        except Exception as error:
            connection.send((0, "error", describe(error)))
            return
        # Otherwise each garbage collection would scan all imported modules, which takes 0.2 s.
        gc.freeze()
        try:
            connection.send((0, "ready", None))
            _serve_requests(collector, connection)
        finally:
            collector.close()


def _serve_requests(collector: Collector, connection: Connection) -> None:
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
    """Return an error's message, with its type unless it is a `SoftmodError`."""
    return str(error) if isinstance(error, SoftmodError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Exit this process as soon as the learner has ended, for whatever reason."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
