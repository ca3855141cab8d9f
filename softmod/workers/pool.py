"""The learner's side of the workers: hand out a round, take the rollout, evaluate, start and end
cleanly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from softmod.errors import PhysicsError, WorkerError
from softmod.spec import EnvSpec, Floats, Rollout, TaskScore
from softmod.system import signals
from softmod.workers.process import GOODBYE, Inline, Share, share_of, shared_weights
from softmod.workers.worker import Plan, State

RESTARTS, WINDOW = 3, 300.0  # how many processes may be replaced in so many seconds
GOALS_PER_TIMEOUT = 10  # of every task; an evaluation has more to do than a round

log = logging.getLogger(__name__)


class Workers:
    """`start` a round, `finish` it, `evaluate`; the tasks lie in `processes` processes, or here
    when that is 0.

    A process that dies, fails or does not answer is replaced: its episodes under way are
    re-executed in a new one, and what it was asked for is asked again, so that the run is the same.
    That may happen `restarts` times in `WINDOW`.

    Args:
        plan: the task set, the actor's form and the run's seed.
        processes: worker processes; 0 steps in this one, in the same order, where nothing can be
            replaced.
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
        self.suite, self.spec = plan.suite, plan.suite.spec
        self.copies, self.training, self.restarts = copies, training, restarts
        step_cost = getattr(plan.suite, "step_cost", lambda task: 1.0)  # not every suite knows
        shares = partition(
            [step_cost(task) for task in range(self.spec.num_tasks)], copies, processes
        )
        shared = shared_weights(plan)
        self.names = list(plan.actor.state_dict())
        self.weights: Floats = np.frombuffer(shared, np.float32)
        self.shares = [
            share_of(plan, *share, training, timeout, not processes, shared) for share in shares
        ]
        self.episodes = Episodes(self.spec, copies)
        self._restarted: list[float] = []

    def start(self, policy: dict[str, Tensor], steps: int, uniform: bool = False) -> None:
        """Begin a round of `steps` in every environment, with these weights, or with `uniform`
        actions.
        """
        self._publish(policy)
        for place in range(len(self.shares)):
            self._ask(place, "collect", steps, uniform)

    def finish(self) -> Rollout:
        """The round's experience `[task, copy, step, ...]`; episodes in the order of
        task and copy.
        """
        parts: list[Rollout] = [self._answer(place) for place in range(len(self.shares))]
        episodes = sorted(episode for part in parts for episode in part.episodes)
        rollout = Rollout(
            obs=self._whole([part.obs for part in parts]),
            action=self._whole([part.action for part in parts]),
            reward=self._whole([part.reward for part in parts]),
            next_obs=self._whole([part.next_obs for part in parts]),
            begins=self._whole([part.begins for part in parts]),
            episodes=episodes,
            faults=sorted(fault for part in parts for fault in part.faults),
            seconds=max(part.seconds for part in parts),
        )
        self.episodes.advance(rollout)
        return rollout

    def evaluate(self, policy: dict[str, Tensor], goals: int) -> list[TaskScore]:
        """The deterministic policy on the first `goals` goals of every task, or as many as every
        task has.

        Raises:
            StoppedError: the run was told to stop; the workers can only be closed then.
        """
        goals = min(goals, *(len(self.suite.goals(task)) for task in range(self.spec.num_tasks)))
        self._publish(policy)
        hands = [list(range(first, goals, len(self.shares))) for first in range(len(self.shares))]
        for place, hand in enumerate(hands):
            self._ask(place, "evaluate", hand)
        success, returns = (
            np.zeros((self.spec.num_tasks, goals), bool),
            np.zeros((self.spec.num_tasks, goals)),
        )
        for place, hand in enumerate(hands):
            patience = max(1.0, len(hand) / GOALS_PER_TIMEOUT)
            success[:, hand], returns[:, hand] = self._answer(place, patience, stoppable=True)
        return [
            TaskScore(task, float(success[i].mean()), float(returns[i].mean()), goals)
            for i, task in enumerate(self.spec.tasks)
        ]

    def state(self) -> State:
        """The episodes under way, `[task, copy, ...]`: enough to re-execute them."""
        return self.episodes.state()

    def restore(self, state: State) -> None:
        """Bring every environment to where `state` was taken, whatever the number of
        processes was.
        """
        self.episodes.restore(state)
        for place in range(len(self.shares)):
            self._ask(place, "restore", self._part(place))
        for place in range(len(self.shares)):
            self._answer(place)

    def close(self) -> None:
        """End all processes; safe to call twice."""
        deadline = time.monotonic() + GOODBYE * (not signals.ending())
        for share in self.shares:
            share.say_goodbye()
        for share in self.shares:
            share.close(deadline)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish(self, policy: dict[str, Tensor]) -> None:
        """Put the weights where all workers read them; between two questions nobody does.

        The memory has no name in the file system, so that nothing is left of it however the
        processes end.
        """
        for place in range(len(self.shares)):
            self._insist(place, lambda share: share.wait_until_ready())
        flat = [
            policy[name].numpy().reshape(-1) for name in self.names
        ]  # PyTorch would wake up all its threads
        np.concatenate(flat, out=self.weights)

    def _ask(self, place: int, method: str, *arguments: Any) -> None:
        try:
            self.shares[place].ask(method, *arguments)
        except WorkerError as error:
            self._replace(place, error)  # which asks the new one

    def _answer(self, place: int, patience: float = 1.0, stoppable: bool = False) -> Any:
        return self._insist(place, lambda share: share.answer(patience, stoppable))

    def _insist(self, place: int, request: Callable[[Share], Any]) -> Any:
        """The result of a request to a share, or to the one that replaces it."""
        while True:
            try:
                return request(self.shares[place])
            except PhysicsError:  # it would break again
                raise
            except WorkerError as error:
                self._replace(place, error)

    def _replace(self, place: int, error: WorkerError) -> None:
        """Put a new process in the place of one that failed, and bring it to where that one was.

        Raises:
            WorkerError: the given one, or one from the attempt, when no restart is left.
        """
        old = self.shares[place]
        while True:
            self._count_restart(old, error)
            fresh = self.shares[place] = old.anew()
            try:
                if self.training and old.asked[0] != "restore":
                    fresh.ask("restore", self._part(place))
                    fresh.answer()
                if old.asked[0]:
                    fresh.ask(*old.asked)
                return
            except WorkerError as again:
                error = again

    def _count_restart(self, share: Share, error: WorkerError) -> None:
        now = time.monotonic()
        self._restarted = [moment for moment in self._restarted if now - moment < WINDOW]
        if isinstance(share, Inline) or len(self._restarted) >= self.restarts:
            raise error
        self._restarted.append(now)
        log.warning(
            "%s; a new one takes over (%d of %d)", error, len(self._restarted), self.restarts
        )

    def _part(self, place: int) -> State:
        share = self.shares[place]
        return {
            name: array[np.ix_(share.tasks, share.copies)]
            for name, array in self.episodes.state().items()
        }

    def _whole(self, parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        whole = np.empty((self.spec.num_tasks, self.copies, *parts[0].shape[2:]), parts[0].dtype)
        for share, part in zip(self.shares, parts, strict=True):
            whole[np.ix_(share.tasks, share.copies)] = part
        return whole


class Episodes:
    """The episodes under way, as the rollouts tell: which, how many steps of them, their actions,
    where they are.
    """

    def __init__(self, spec: EnvSpec, copies: int) -> None:
        shape = (spec.num_tasks, copies)
        self.horizon = spec.episode_steps
        self._state: State = {
            "episode": np.full(shape, -1, np.int64),
            "steps": np.full(
                shape, spec.episode_steps, np.int64
            ),  # the last one is over, and there is none yet
            "actions": np.zeros((*shape, spec.episode_steps, spec.action_dim), np.float32),
            "obs": np.zeros((*shape, spec.obs_dim), np.float32),
        }

    def advance(self, rollout: Rollout) -> None:
        """A round was made."""
        episode, steps, actions = (self._state[name] for name in ("episode", "steps", "actions"))
        cut = {((fault.task, fault.copy), fault.step): fault.episode for fault in rollout.faults}
        for at in np.ndindex(steps.shape):
            done, total = 0, rollout.action.shape[2]
            cuts = sorted(step for where, step in cut if where == at)
            while done < total:
                if done in cuts:
                    episode[at], steps[at] = cut[at, done], self.horizon
                if steps[at] == self.horizon:
                    episode[at], steps[at], actions[at] = episode[at] + 1, 0, 0.0
                end = next((step for step in cuts if step > done), total)
                count = min(end - done, self.horizon - int(steps[at]))
                actions[at][steps[at] : steps[at] + count] = rollout.action[at][done : done + count]
                steps[at], done = steps[at] + count, done + count
        self._state["obs"][...] = rollout.next_obs[:, :, -1]

    def state(self) -> State:
        return {name: array.copy() for name, array in self._state.items()}

    def restore(self, state: State) -> None:
        for name, array in self._state.items():
            array[...] = state[name]


def partition(
    costs: Sequence[float], copies: int, processes: int
) -> list[tuple[list[int], list[int]]]:
    """Shares `(tasks, copies)` for each process: by task first, by copies when processes outnumber
    tasks.

    Tasks go to the hand that has least to do so far, the heaviest first, and all hands get as many,
    or one less.
    """
    num_tasks = len(costs)
    wanted = max(1, min(processes, num_tasks * copies))
    groups = max(1, min(copies, wanted // num_tasks))
    hands: list[list[int]] = [[] for _ in range(min(num_tasks, wanted // groups))]
    for place, task in enumerate(sorted(range(num_tasks), key=lambda task: -costs[task])):
        open_ones = [
            hand for hand in hands if len(hand) == place // len(hands)
        ]  # those that this turn has not served
        min(open_ones, key=lambda hand: sum(costs[mine] for mine in hand)).append(task)
    return [
        (sorted(hand), list(range(group, copies, groups)))
        for hand in hands
        for group in range(groups)
    ]
