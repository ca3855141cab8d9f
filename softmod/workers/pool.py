"""The learner's side of the workers: rounds, evaluations, restarts and shutdown."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from softmod.errors import PhysicsError, WorkerError
from softmod.spec import Floats, Rollout, TaskScore, UnderWay
from softmod.system import signals
from softmod.workers.process import (
    SHUTDOWN,
    InlineWorker,
    Worker,
    private_weights,
    shared_weights,
    start_worker,
)
from softmod.workers.worker import Plan

RESTARTS = 3  # most restarts within WINDOW
WINDOW = 300.0  # seconds
GOALS_PER_TIMEOUT = 10  # goals per task for which an evaluation may take one time-out

log = logging.getLogger(__name__)


class Workers:
    """A pool of workers: `start` and `finish` a round, or `evaluate`.

    Between `start` and `finish`, the learner may do something else, or `wait`.

    A process that dies, fails or does not reply in time is restarted. Its unfinished episodes are
    re-executed and its request is repeated, so the results of the run do not change.

    Args:
        plan: the task set, the policy and the run's seed.
        processes: the number of worker processes; 0: all environments are stepped in this process,
            in the same order, without restarts.
        copies: environments per task.
        timeout: seconds for a reply; for an evaluation, per ten goals.
        training: whether to build training environments; `evaluate` needs none.
        restarts: the most restarts within `WINDOW` seconds.

    Raises:
        WorkerError: an environment or worker failed and no restart is left.
    """

    def __init__(
        self,
        plan: Plan,
        processes: int,
        copies: int = 1,
        timeout: float = 300.0,
        training: bool = True,
        restarts: int = RESTARTS,
    ) -> None:
        self.suite = plan.suite
        self.spec = plan.suite.spec
        self.copies = copies
        self.training = training
        self.restarts = restarts
        step_cost = getattr(plan.suite, "step_cost", lambda task: 1.0)  # optional in a suite
        costs = [step_cost(task) for task in range(self.spec.num_tasks)]
        memory = shared_weights(plan) if processes else private_weights(plan)
        self.weights: Floats = memory.array
        self.workers = [
            start_worker(plan, tasks, slots, training, timeout, not processes, memory)
            for tasks, slots in partition(costs, copies, processes)
        ]
        self.under_way = UnderWay.none(self.spec, self.spec.num_tasks, copies)
        self._replies: list[Rollout] = []  # to a round that was waited for
        self._restarted: list[float] = []

    def start(self, policy: Float[Tensor, " number"], steps: int, uniform: bool = False) -> None:
        """Start a round of `steps` steps in every environment.

        Args:
            policy: the policy's weights (`networks.weights.flatten`).
            steps: steps per environment.
            uniform: take uniform random actions instead of the policy's.
        """
        self._replies = []
        self._publish(policy)
        for index in range(len(self.workers)):
            self._ask(index, "collect", steps, uniform)

    def wait(self) -> None:
        """Wait for the round, whose experience `finish` returns.

        Raises:
            StoppedError: a signal stopped the run; afterwards, only `close` may be called.
        """
        self._replies = self._round(stoppable=True)

    def finish(self) -> Rollout:
        """Wait for the round; return its experience `[task, copy, step, ...]`.

        Episodes are in the order of task and copy.
        """
        parts = self._replies or self._round()
        under_way = [part.under_way for part in parts if part.under_way is not None]
        self.under_way = UnderWay(
            self._joined([part.episode for part in under_way]),
            self._joined([part.steps for part in under_way]),
            self._joined([part.actions for part in under_way]),
            self._joined([part.obs for part in under_way]),
        )
        return Rollout(
            obs=self._joined([part.obs for part in parts]),
            action=self._joined([part.action for part in parts]),
            reward=self._joined([part.reward for part in parts]),
            next_obs=self._joined([part.next_obs for part in parts]),
            begins=self._joined([part.begins for part in parts]),
            episodes=sorted(episode for part in parts for episode in part.episodes),
            faults=sorted(fault for part in parts for fault in part.faults),
            under_way=self.under_way,
            seconds=max(part.seconds for part in parts),
        )

    def evaluate(self, policy: Float[Tensor, " number"], goals: int) -> list[TaskScore]:
        """Evaluate the deterministic policy on the first `goals` goals of every task.

        If a task has fewer goals, all tasks use that number.

        Raises:
            StoppedError: a signal stopped the run; afterwards, only `close` may be called.
        """
        goals = min(goals, *(len(self.suite.goals(task)) for task in range(self.spec.num_tasks)))
        self._publish(policy)
        count = len(self.workers)
        parts = [list(range(first, goals, count)) for first in range(count)]
        for index, part in enumerate(parts):
            self._ask(index, "evaluate", part)
        success = np.zeros((self.spec.num_tasks, goals), bool)
        returns = np.zeros((self.spec.num_tasks, goals))
        for index, part in enumerate(parts):
            timeouts = max(1.0, len(part) / GOALS_PER_TIMEOUT)
            success[:, part], returns[:, part] = self._answer(index, timeouts, stoppable=True)
        return [
            TaskScore(task, float(success[i].mean()), float(returns[i].mean()), goals)
            for i, task in enumerate(self.spec.tasks)
        ]

    def restore(self, under_way: UnderWay) -> None:
        """Re-execute the unfinished episodes; the number of processes may have changed."""
        self.under_way = under_way
        for index in range(len(self.workers)):
            self._ask(index, "restore", self._part(index))
        for index in range(len(self.workers)):
            self._answer(index)

    def close(self) -> None:
        """End all processes; repeated calls are harmless."""
        deadline = time.monotonic() + SHUTDOWN * (not signals.ending())
        for worker in self.workers:
            worker.request_shutdown()
        for worker in self.workers:
            worker.close(deadline)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish(self, policy: Float[Tensor, " number"]) -> None:
        """Write the weights to memory that all workers share, while no request is pending.

        The memory has no name in the file system, so nothing is left behind when processes end.
        """
        for index in range(len(self.workers)):
            self._retried(index, lambda worker: worker.wait_until_ready())
        self.weights[:] = policy.numpy()

    def _round(self, stoppable: bool = False) -> list[Rollout]:
        return [self._answer(index, stoppable=stoppable) for index in range(len(self.workers))]

    def _ask(self, index: int, method: str, *arguments: Any) -> None:
        try:
            self.workers[index].ask(method, *arguments)
        except WorkerError as error:
            self._restart(index, error)  # repeats the request

    def _answer(self, index: int, timeouts: float = 1.0, stoppable: bool = False) -> Any:
        return self._retried(index, lambda worker: worker.answer(timeouts, stoppable))

    def _retried(self, index: int, call: Callable[[Worker], Any]) -> Any:
        """Return the result of a call to a worker, restarting it as often as allowed."""
        while True:
            try:
                return call(self.workers[index])
            except PhysicsError:  # a repetition would fail in the same way
                raise
            except WorkerError as error:
                self._restart(index, error)

    def _restart(self, index: int, error: WorkerError) -> None:
        """Restart a failed worker, restore its episodes, and repeat its pending request.

        Raises:
            WorkerError: no restart is left; the error is `error` or that of the last attempt.
        """
        request = self.workers[index].request
        while True:
            self._count_restart(self.workers[index], error)
            fresh = self.workers[index] = self.workers[index].restarted()
            try:
                if self.training and request[0] != "restore":
                    fresh.ask("restore", self._part(index))
                    fresh.answer()
                if request[0]:
                    fresh.ask(*request)
                return
            except WorkerError as latest:
                error = latest

    def _count_restart(self, worker: Worker, error: WorkerError) -> None:
        now = time.monotonic()
        self._restarted = [moment for moment in self._restarted if now - moment < WINDOW]
        if isinstance(worker, InlineWorker) or len(self._restarted) >= self.restarts:
            raise error
        self._restarted.append(now)
        log.warning(
            "%s; a new one takes over (%d of %d)", error, len(self._restarted), self.restarts
        )

    def _part(self, index: int) -> UnderWay:
        """Return a worker's part of the unfinished episodes."""
        at = np.ix_(self.workers[index].tasks, self.workers[index].copies)
        whole = self.under_way
        return UnderWay(whole.episode[at], whole.steps[at], whole.actions[at], whole.obs[at])

    def _joined(self, parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Join the workers' arrays `[task, copy, ...]`."""
        whole = np.empty((self.spec.num_tasks, self.copies, *parts[0].shape[2:]), parts[0].dtype)
        for worker, part in zip(self.workers, parts, strict=True):
            whole[np.ix_(worker.tasks, worker.copies)] = part
        return whole


def partition(
    costs: Sequence[float], copies: int, processes: int
) -> list[tuple[list[int], list[int]]]:
    """Split environments into workers, by task and, with more processes than tasks, also by copy.

    Tasks are assigned in order of decreasing cost, each to the worker with the least cost so far.
    The numbers of tasks per worker differ by at most one.

    Args:
        costs: the cost of a step of each task.
        copies: environments per task.
        processes: the number of processes; 0 counts as 1.

    Returns:
        The tasks and copies of each worker.
    """
    num_tasks = len(costs)
    workers = max(1, min(processes, num_tasks * copies))
    copy_groups = max(1, min(copies, workers // num_tasks))
    task_groups: list[list[int]] = [[] for _ in range(min(num_tasks, workers // copy_groups))]
    by_cost = sorted(range(num_tasks), key=lambda task: -costs[task])
    for number, task in enumerate(by_cost):
        smallest = [group for group in task_groups if len(group) == number // len(task_groups)]
        cheapest = min(smallest, key=lambda group: sum(costs[other] for other in group))
        cheapest.append(task)
    parts = []
    for tasks in task_groups:
        for first in range(copy_groups):
            parts.append((sorted(tasks), list(range(first, copies, copy_groups))))
    return parts
