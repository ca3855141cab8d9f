"""A task set: a point on a line goes to the goal, or away from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softmod.spec import EnvSpec

SIGN = {"line-approach": 1.0, "line-avoid": -1.0}


class Line:
    """Knows the tasks and their goals; picklable, since workers get a copy.

    The arguments are the keys of `env`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        goals: str,
        goal_seed: int,
        reward: str,
        horizon: int,
        train_horizon: int | None,
        name: str,
        fast: bool,
    ) -> None:
        self.spec = EnvSpec(
            tuple(tasks), obs_dim=2, action_dim=1, horizon=horizon, train_horizon=train_horizon
        )
        rng = np.random.default_rng(goal_seed)
        self._goals = rng.uniform(0.3, 0.9, (50, 1)) * rng.choice([-1, 1], (50, 1))

    def goals(self, task: int) -> np.ndarray:
        return self._goals

    def make(self, task: int, render: bool = False) -> LineEnv:
        return LineEnv(SIGN[self.spec.tasks[task]])


class LineEnv:
    """One task's environment.

    A reset is a pure function of the goal; episodes end by the horizon alone.
    """

    def __init__(self, sign: float) -> None:
        self.sign, self.place, self.target = sign, 0.0, 0.0

    def reset(self, goal: np.ndarray) -> np.ndarray:
        self.place, self.goal = 0.0, float(goal[0])
        self.target = self.sign * self.goal
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self.place = float(np.clip(self.place + 0.1 * action[0], -1.0, 1.0))
        distance = abs(self.target - self.place)
        return self._observation(), 1.0 - distance, distance < 0.1

    def draw_goal(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0.3, 0.9, 1) * rng.choice([-1, 1])

    def render(self) -> np.ndarray:
        raise NotImplementedError("a line is not much to look at")

    def close(self) -> None:
        pass

    def _observation(self) -> np.ndarray:
        return np.array([self.place, self.goal], np.float32)
