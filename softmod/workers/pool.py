"""The learner's side of the workers: hand out a round, take the rollout, evaluate, start and end
cleanly.
"""

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
from softmod.workers.process import SHUTDOWN, InlineWorker, Worker, shared_weights, start_worker
from softmod.workers.worker import Plan

# how many processes may be restarted in so many seconds
RESTARTS = 3
WINDOW = 300.0
GOALS_PER_TIMEOUT = 10  # of every task; an evaluation has more to do than a round

log = logging.getLogger(__name__)


class Workers:
    """`start` a round, `finish` it, `evaluate`; the environments are spread over `processes`
    processes, or stay in this one when that is 0.

    A process that dies, fails or does not answer is restarted: its episodes under way are
    re-executed, and its request is repeated, so that the run is the same. That may happen
    `restarts` times in `WINDOW`.

    Args:
        plan: the task set, the actor's form and the run's seed.
        processes: worker processes; 0 steps in this one, in the same order, without restarts.
        copies: environments per task.
        timeout: seconds that a reply may take; an evaluation may take them for every ten goals.
        training: whether there will be rounds; without, only `evaluate` has environments.
        restarts: see above.

    Raises:
        WorkerError: an environment failed, or a worker died or did not answer, too often; later
            calls are refused.
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
        shared = shared_weights(plan)
        self.weights: Floats = shared.array
        self.workers = [
            start_worker(plan, tasks, slots, training, timeout, not processes, shared)
            for tasks, slots in partition(costs, copies, processes)
        ]
        self.under_way = UnderWay.none(self.spec, self.spec.num_tasks, copies)
        self._restarted: list[float] = []

    def start(self, policy: Float[Tensor, " number"], steps: int, uniform: bool = False) -> None:
        """Begin a round of `steps` in every environment, with these weights
        (`networks.weights.flatten`), or with `uniform` actions.
        """
        self._publish(policy)
        for index in range(len(self.workers)):
            self._ask(index, "collect", steps, uniform)

    def finish(self) -> Rollout:
        """Return the round's experience `[task, copy, step, ...]`; episodes in the order of task
        and copy.
        """
        parts: list[Rollout] = [self._answer(index) for index in range(len(self.workers))]
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
        """Play the deterministic policy on the first `goals` goals of every task, or as many as
        every task has.

        Raises:
            StoppedError: a signal asked the run to stop; the workers can only be closed then.
        """
        goals = min(goals, *(len(self.suite.goals(task)) for task in range(self.spec.num_tasks)))
        self._publish(policy)
        many = len(self.workers)
        parts = [list(range(first, goals, many)) for first in range(many)]
        for index, part in enumerate(parts):
            self._ask(index, "evaluate", part)
        success = np.zeros((self.spec.num_tasks, goals), bool)
        returns = np.zeros((self.spec.num_tasks, goals))
        for index, part in enumerate(parts):
            patience = max(1.0, len(part) / GOALS_PER_TIMEOUT)
            success[:, part], returns[:, part] = self._answer(index, patience, stoppable=True)
        return [
            TaskScore(task, float(success[i].mean()), float(returns[i].mean()), goals)
            for i, task in enumerate(self.spec.tasks)
        ]

    def restore(self, under_way: UnderWay) -> None:
        """Bring every environment to where its episode was, whatever the number of processes."""
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
        """Write the weights where all workers read them; between two requests none of them does.

        The memory has no name in the file system, so that nothing is left of it however the
        processes end.
        """
        for index in range(len(self.workers)):
            self._retried(index, lambda worker: worker.wait_until_ready())
        self.weights[:] = policy.numpy()

    def _ask(self, index: int, method: str, *arguments: Any) -> None:
        try:
            self.workers[index].ask(method, *arguments)
        except WorkerError as error:
            self._restart(index, error)  # which repeats the request

    def _answer(self, index: int, patience: float = 1.0, stoppable: bool = False) -> Any:
        return self._retried(index, lambda worker: worker.answer(patience, stoppable))

    def _retried(self, index: int, request: Callable[[Worker], Any]) -> Any:
        """Return the result of a request to a worker, restarted as often as that is allowed."""
        while True:
            try:
                return request(self.workers[index])
            except PhysicsError:  # it would break again
                raise
            except WorkerError as error:
                self._restart(index, error)

    def _restart(self, index: int, error: WorkerError) -> None:
        """Restart a worker that failed, and bring it to where it was.

        Raises:
            WorkerError: the given one, or one from the attempt, when no restart is left.
        """
        asked = self.workers[index].asked
        while True:
            self._count_restart(self.workers[index], error)
            fresh = self.workers[index] = self.workers[index].restarted()
            try:
                if self.training and asked[0] != "restore":
                    fresh.ask("restore", self._part(index))
                    fresh.answer()
                if asked[0]:
                    fresh.ask(*asked)
                return
            except WorkerError as again:
                error = again

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
        """Return a worker's part of the episodes under way."""
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
    """Return each worker's `(tasks, copies)`: by task first, by copies where processes outnumber
    tasks.

    Tasks go to the worker that has least to do so far, the heaviest first; all workers get as many
    tasks, or one less.
    """
    num_tasks = len(costs)
    wanted = max(1, min(processes, num_tasks * copies))
    groups = max(1, min(copies, wanted // num_tasks))
    hands: list[list[int]] = [[] for _ in range(min(num_tasks, wanted // groups))]
    for turn, task in enumerate(sorted(range(num_tasks), key=lambda task: -costs[task])):
        unserved = [hand for hand in hands if len(hand) == turn // len(hands)]
        min(unserved, key=lambda hand: sum(costs[mine] for mine in hand)).append(task)
    return [
        (sorted(hand), list(range(group, copies, groups)))
        for hand in hands
        for group in range(groups)
    ]
