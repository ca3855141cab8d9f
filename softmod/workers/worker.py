"""The process's side: the environments of some tasks, stepped with a frozen policy."""

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

from softmod.capture.numpy_graph import Repeated, repeated
from softmod.envs.episode import EvalEpisode
from softmod.errors import PhysicsError, SoftmodError, WorkerError
from softmod.networks.gaussian import Actor, actions
from softmod.networks.weights import bind
from softmod.seeding import Purpose, generator, pink
from softmod.spec import EnvSpec, Episode, Fault, Floats, Rollout, TaskEnv, TaskSuite, UnderWay
from softmod.system import signals
from softmod.workers.memory import weights_in

MOST_IN_A_ROW = 5  # episodes whose first step breaks the physics


@dataclass(frozen=True)
class Plan:
    """Describe to every worker what it steps, and how.

    Args:
        suite: the task set.
        actor: the policy's form; its weights change each round.
        seed: of the run.
        draw_goals: draw a new goal for each episode, instead of one of the task's goals.
        pink_noise: correlate an episode's exploration over its steps.
    """

    suite: TaskSuite
    actor: Actor
    seed: int
    draw_goals: bool = False
    pink_noise: bool = False


class EnvSlot:
    """An environment and the training episode under way in it. Goal and noise are keyed by (seed,
    task, copy, episode).
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
        self.steps = self.spec.episode_steps  # of an episode before the first one, which is over
        self.rewards: list[float] = []
        self.success = False

    def begin(self, episode: int) -> None:
        """Reset to the episode's own goal."""
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
        """Return whether the episode has had all its steps."""
        return self.steps == self.spec.episode_steps

    def step(self, action: Floats) -> float:
        """Act; return the reward."""
        self.actions[self.steps] = action
        self.obs, reward, success = self.env.step(action)
        self.rewards.append(reward)
        self.steps += 1
        self.success = self.success or success
        return reward

    def ended(self) -> Episode:
        """Return the episode, after its last step."""
        rewards = tuple(self.rewards)
        return Episode(self.task, self.copy, self.episode, sum(rewards), self.success, rewards)

    def restore(self, episode: int, steps: int, actions: Floats, obs: Floats) -> None:
        """Re-execute the first steps of an episode, and check that they lead to the same
        observation.

        An episode that is over, or the one before the first, is only noted.

        Raises:
            WorkerError: they do not.
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
    """The environments of `tasks x copies`, others for evaluation, and the policy that acts in
    them.

    Args:
        plan: what is stepped, and how.
        tasks: indices of the tasks.
        copies: of each task.
        training: whether to build training environments; `evaluate` needs none.
        weights: a flat array that holds the policy's weights; None: the plan's own weights.
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
        self.slots: dict[tuple[int, int], EnvSlot] = {}  # by where a task and a copy stand
        if training:
            for at in np.ndindex(len(tasks), len(copies)):
                self.slots[at] = EnvSlot(plan, tasks[at[0]], copies[at[1]])
        self.eval_envs: list[TaskEnv] = []

    # Recorded at their first use, when there are weights to check them with.

    @cached_property
    def explore(self) -> Repeated:
        """Actions `[task, copy, action]` from its inputs: observations and noise of every slot."""
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
        """Take `steps` in every environment, exploring or with uniform actions; return `[task,
        copy, step, ...]`.
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
        """Actions uniform in [-1, 1], made of the episodes' own normal noise."""
        _, noise = self.explore.inputs
        return (2.0 * ndtr(noise) - 1.0).astype(np.float32)

    def _step(self, rollout: Rollout, step: int, act: Callable[[], Floats]) -> None:
        """Take one step in every slot; the policy acts once for all of them."""
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
        """Replace a step that broke the physics by the first one of the next episode; return its
        reward.

        Raises:
            PhysicsError: that one broke as well, and so did those after it.
        """
        obs, noise = self.explore.inputs
        for _ in range(MOST_IN_A_ROW):
            rollout.faults.append(Fault(slot.task, slot.copy, slot.episode, at[2]))
            slot.begin(slot.episode + 1)
            obs[at[:2]], noise[at[:2]] = slot.obs, slot.noise[0]
            rollout.obs[at] = slot.obs
            rollout.action[at] = act()[at[:2]]
            rollout.begins[at] = True
            try:
                return slot.step(rollout.action[at])
            except PhysicsError as again:
                error = again
        raise error

    def _under_way(self) -> UnderWay:
        """Return a copy of the episodes under way."""
        under_way = UnderWay.none(self.spec, len(self.tasks), len(self.copies))
        for at, slot in self.slots.items():
            under_way.episode[at] = slot.episode
            under_way.steps[at] = slot.steps
            under_way.actions[at] = slot.actions
            under_way.obs[at] = slot.obs
        return under_way

    def evaluate(self, goals: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Play the deterministic policy on these goals of every task; return success and return
        `[task, goal]`.

        Actions are always computed for all tasks, one environment each, so that the result does not
        depend on how goals are spread over workers.

        Raises:
            StoppedError: a signal asked this process to stop; workers ignore signals.
        """
        tasks = range(self.spec.num_tasks)
        self.eval_envs = self.eval_envs or [self.plan.suite.make(task) for task in tasks]
        success = np.zeros((self.spec.num_tasks, len(goals)), bool)
        returns = np.zeros((self.spec.num_tasks, len(goals)))
        waiting = {task: deque(range(len(goals))) for task in tasks}
        playing: dict[int, tuple[int, EvalEpisode]] = {}
        (obs,) = self.exploit.inputs
        while True:
            for task in tasks:
                if task not in playing and waiting[task]:
                    turn = waiting[task].popleft()
                    playing[task] = turn, self._episode(task, goals[turn])
            if not playing:
                return success, returns
            if signals.stopping():
                raise signals.StoppedError
            for task, (_, episode) in playing.items():
                obs[task, 0] = episode.obs
            actions = self.exploit()
            for task, (turn, episode) in list(playing.items()):
                episode.step(actions[task, 0])
                if episode.over:
                    success[task, turn] = episode.success
                    returns[task, turn] = episode.episode_return
                    del playing[task]

    def _episode(self, task: int, goal: int) -> EvalEpisode:
        goals = self.plan.suite.goals(task)
        return EvalEpisode(self.eval_envs[task], goals[goal], self.spec.horizon)

    def restore(self, under_way: UnderWay) -> None:
        """Bring every environment to where its episode was."""
        for at, slot in self.slots.items():
            episode = int(under_way.episode[at])
            steps = int(under_way.steps[at])
            slot.restore(episode, steps, under_way.actions[at], under_way.obs[at])

    def close(self) -> None:
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
    """Run a worker process: build its environments, then answer (number, method, arguments) until
    asked to close.

    `packed` is the pickled plan, `weights` shared memory with the policy's weights.
    """
    for number in (signal.SIGINT, *signals.STOPS):  # the learner's to handle
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
        # Collecting garbage among what was imported and built would take 0.2 s each time.
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
    """Return an error's text, with its type where it is none of ours."""
    return str(error) if isinstance(error, SoftmodError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """End this process with its learner, however that one ends."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
