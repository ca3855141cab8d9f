"""Experience whose every number says where it comes from, as rollouts and as plain lists of
transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from softmod.spec import EnvSpec, Rollout

TASKS = ("a", "b", "c")
WHOLE = EnvSpec(TASKS, 2, 1, 10)  # an observation is the state
FRAMES = EnvSpec(
    TASKS, 7, 1, 10, None, 2
)  # the state, the state before, and three numbers of the episode


class Transition(NamedTuple):
    """One transition of a list; `follows` is the number of the one before it in its episode."""

    obs: list[float]
    action: float
    reward: float
    next_obs: list[float]
    follows: int | None


@dataclass
class Slot:
    """An environment under way: its last transition, the steps of its episode, and the observation
    it shows.
    """

    last: int = -1
    steps: int = 0
    obs: np.ndarray | None = None


class Stream:
    """Rounds of experience; episodes end by their horizon or, with the probability `faults`, before
    it.

    The action of the n-th transition of a task is `1000 task + n`. `lists[task]` holds all
    transitions so far.
    """

    def __init__(self, spec: EnvSpec, copies: int = 1, seed: int = 0, faults: float = 0.1) -> None:
        self.spec, self.copies, self.faults = spec, copies, faults
        self.draws = np.random.default_rng(seed)
        self.slots = [[Slot() for _ in range(copies)] for _ in spec.tasks]
        self.lists: list[list[Transition]] = [[] for _ in spec.tasks]

    def rollout(self, steps: int) -> Rollout:
        shape, obs_dim = (len(self.lists), self.copies, steps), self.spec.obs_dim
        made = Rollout(
            np.zeros((*shape, obs_dim), "f"), np.zeros((*shape, 1), "f"), np.zeros(shape, "f"),
            np.zeros((*shape, obs_dim), "f"), np.zeros(shape, bool),
        )  # fmt: skip
        for task in range(shape[0]):
            for step in range(steps):
                for copy in range(self.copies):
                    self._step(made, task, copy, step)
        return made

    def _step(self, made: Rollout, task: int, copy: int, step: int) -> None:
        slot, number, frame = self.slots[task][copy], len(self.lists[task]), self.spec.frame
        begins = (
            slot.obs is None or slot.steps == self.spec.horizon or self.draws.random() < self.faults
        )
        if begins:
            slot.obs, slot.steps = self.draws.standard_normal(self.spec.obs_dim).astype("f"), 0
        assert slot.obs is not None
        after = self.draws.standard_normal(self.spec.obs_dim).astype("f")
        after[self.spec.state_dim :] = slot.obs[self.spec.state_dim :]
        after[self.spec.state_dim : self.spec.state_dim + frame] = slot.obs[:frame]
        action, reward = 1000.0 * task + number, float(self.draws.integers(1, 100))
        at = task, copy, step
        made.obs[at], made.action[at], made.reward[at], made.next_obs[at] = (
            slot.obs,
            action,
            reward,
            after,
        )
        made.begins[at] = begins
        follows = None if begins else slot.last
        self.lists[task].append(
            Transition(slot.obs.tolist(), action, reward, after.tolist(), follows)
        )
        slot.last, slot.steps, slot.obs = number, slot.steps + 1, after

    def expected(
        self, task: int, number: int, n_step: int, discount: float
    ) -> tuple[float, list[float], float]:
        """The reward, the next observation and the discount of a transition over `n_step` steps."""
        kept = self.lists[task]
        total, factor, last = kept[number].reward, discount, number
        for after in range(number + 1, len(kept)):
            if n_step > 1 and kept[after].follows == last:
                total, factor, last, n_step = (
                    total + factor * kept[after].reward,
                    factor * discount,
                    after,
                    n_step - 1,
                )
        return total, kept[last].next_obs, factor
