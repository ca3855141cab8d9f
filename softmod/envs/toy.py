"""A toy set: a point and a puck in the plane, fast and without MuJoCo.

The same observation needs a different action in each task. The world is the square [-1, 1]^2. The
point starts in its center and moves by a tenth of the action.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from softmod.envs.tasks import GOALS, REWARDS, TOY_TASKS, check_choice, check_horizon, check_tasks
from softmod.errors import ConfigError, PhysicsError, WorkerError
from softmod.spec import EnvSpec, Floats, Goal

NUM_GOALS = 50
SPEED = 0.1  # distance per step at full action
RADIUS = 0.15  # distance at which a target counts as reached
BORDER = 0.8  # coordinates of goals and pucks are within +-BORDER
PIXELS = 128
WHITE = (255, 255, 255)
GREEN = (90, 180, 90)
ORANGE = (230, 140, 40)
BLUE = (50, 90, 200)


class Toy:
    """A set of toy tasks, with observations `[9]` and actions `[2]`.

    The arguments are those of `MetaWorld`.

    Raises:
        ConfigError: a task or option is unknown, a horizon is outside [1, 500], or the reward is
            v1, which the toy tasks do not have.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        goals: str = "benchmark",
        goal_seed: int = 0,
        reward: str = "v2",
        horizon: int = 50,
        name: str = "toy",
        fast: bool = True,  # no effect
        train_horizon: int | None = None,
    ) -> None:
        shorter = None if train_horizon is None else check_horizon(train_horizon)
        self.spec = EnvSpec(check_tasks(tasks, TOY_TASKS), 9, 2, check_horizon(horizon), shorter)
        self.name = name
        self.goal_mode = check_choice("env.goals", goals, GOALS)
        self.goal_seed = int(goal_seed)
        self.reward = check_choice("env.reward", reward, REWARDS)
        if reward == "v1":
            raise ConfigError(
                "env.reward is 'v1', but the toy tasks have only one reward: leave it at v2"
            )

    def goals(self, task: int) -> Goal:
        """Return a task's goals `[num_goals, 4]`: 50 of them, or only the first if `fixed`."""
        # The index among all toy tasks, so that goals do not depend on the other tasks of the set.
        index = TOY_TASKS.index(self.spec.tasks[task])
        rng = np.random.default_rng(np.random.SeedSequence((self.goal_seed, index)))
        goals = np.stack([_draw(rng) for _ in range(NUM_GOALS)])
        return goals[:1] if self.goal_mode == "fixed" else goals

    def make(self, task: int, render: bool = False) -> ToyEnv:
        """Build a new environment of one task."""
        return ToyEnv(self.spec.tasks[task], self.spec.horizon, render)


class ToyEnv:
    """One toy task.

    A goal is `[goal x, goal y, puck x, puck y]`. An observation is `[point x, y, velocity x, y,
    puck x, y, goal x, y, held]`; `held` is 1 once the point has picked up the puck.
    """

    def __init__(self, task: str, horizon: int = 50, render: bool = False) -> None:
        self._task = task
        self._horizon = horizon
        self._render = render
        self._carries = task == "toy-carry"
        self._steps = horizon
        self._x = self._y = self._vx = self._vy = 0.0
        self._puck_x = self._puck_y = self._goal_x = self._goal_y = 0.0
        self._target_x = self._target_y = 0.0
        self._held = False

    def reset(self, goal: Goal) -> Floats:
        """Start an episode in the center with a goal `[4]`; return the observation `[9]`."""
        self._goal_x, self._goal_y, self._puck_x, self._puck_y = goal.tolist()
        self._x = self._y = self._vx = self._vy = 0.0
        self._steps = 0
        self._held = False
        self._target_x, self._target_y = self._target()
        return self._observation()

    def step(self, action: Floats) -> tuple[Floats, float, bool]:
        """Apply an action `[2]` in [-1, 1].

        Returns:
            The observation `[9]`, the reward in (0, 10], and whether this step is a success.

        Raises:
            WorkerError: no episode is running.
            PhysicsError: the action is not finite.
        """
        if self._steps >= self._horizon:
            raise WorkerError(
                f"{self._task}: no episode is running (the horizon is {self._horizon}), reset it"
                " first"
            )
        self._steps += 1
        action_x, action_y = action.tolist()
        if not isfinite(action_x + action_y):
            raise PhysicsError(
                f"{self._task}: a non-finite action at step {self._steps} of an episode"
            )
        before = self._to_target()
        self._move(action_x, action_y)
        after = self._to_target()
        reached = after < RADIUS
        merit = _merit(before, after)
        if self._carries:
            reward, success = self._carry(reached, merit)
        else:
            reward = 10.0 * merit
            success = reached
        return self._observation(), reward, success

    def draw_goal(self, rng: np.random.Generator) -> Goal:
        """Draw a goal `[4]` from the distribution of all toy tasks, using `rng` only."""
        return _draw(rng)

    def render(self) -> NDArray[np.uint8]:
        """Return an image `[128, 128, 3]`, y upwards: goal green, puck orange, point blue.

        Raises:
            WorkerError: the environment was made without `render=True`.
        """
        if not self._render:
            raise WorkerError(f"{self._task}: made without render=True, so it cannot render")
        picture = np.full((PIXELS, PIXELS, 3), WHITE, dtype=np.uint8)
        _disc(picture, self._goal_x, self._goal_y, RADIUS, GREEN)
        _disc(picture, self._puck_x, self._puck_y, 0.8 * RADIUS, ORANGE)
        _disc(picture, self._x, self._y, 0.5 * RADIUS, BLUE)
        return picture

    def close(self) -> None:
        """No-op."""

    def _move(self, action_x: float, action_y: float) -> None:
        x = min(1.0, max(-1.0, self._x + SPEED * min(1.0, max(-1.0, action_x))))
        y = min(1.0, max(-1.0, self._y + SPEED * min(1.0, max(-1.0, action_y))))
        self._vx = x - self._x
        self._vy = y - self._y
        self._x = x
        self._y = y

    def _to_target(self) -> float:
        return _distance(self._target_x - self._x, self._target_y - self._y)

    def _carry(self, reached: bool, merit: float) -> tuple[float, bool]:
        """Pick up the puck once it is reached; return reward and success.

        The reward is at most 3 on the way to the puck, and 3 to 10 on the way to the goal.
        """
        if self._held:
            self._puck_x = self._x
            self._puck_y = self._y
            return 3.0 + 7.0 * merit, reached
        if reached:
            self._held = True
            self._puck_x = self._x
            self._puck_y = self._y
            self._target_x = self._goal_x
            self._target_y = self._goal_y
        return 3.0 * merit, False

    def _target(self) -> tuple[float, float]:
        if self._task in ("toy-touch", "toy-carry"):
            return self._puck_x, self._puck_y
        sign = -1.0 if self._task == "toy-opposite" else 1.0
        return sign * self._goal_x, sign * self._goal_y

    def _observation(self) -> Floats:
        point = (self._x, self._y, self._vx, self._vy)
        things = (self._puck_x, self._puck_y, self._goal_x, self._goal_y, self._held)
        return np.array(point + things, dtype=np.float32)


def _distance(x: float, y: float) -> float:
    return sqrt(x * x + y * y)  # correctly rounded everywhere, so runs agree across machines


def _closeness(distance: float) -> float:
    """Return 1 at the target, decreasing with distance, most steeply near the target."""
    return 1.0 / (1.0 + 5.0 * distance)


def _merit(before: float, after: float) -> float:
    """Return a reward in (0, 1] from the distances to the target before and after a step.

    One half is for being near, the other for getting nearer. The latter gives every action an
    immediate effect, so that a critic learns quickly.
    """
    nearer = 1.0 if after < RADIUS else 0.5 + 0.5 * min(1.0, max(-1.0, (before - after) / SPEED))
    return 0.5 * _closeness(after) + 0.5 * nearer


def _draw(rng: np.random.Generator) -> Goal:
    """Draw a goal and a puck `[4]`.

    The goal, its mirror image, the puck and the center keep a distance from each other.
    """
    while True:
        drawn: Goal = rng.uniform(-BORDER, BORDER, size=4)
        goal = drawn[:2]
        puck = drawn[2:]
        differences = (goal, puck, goal - puck, goal + puck)
        if all(_distance(*vector) > 3 * RADIUS for vector in differences):
            return drawn


def _disc(
    picture: NDArray[np.uint8], x: float, y: float, radius: float, color: tuple[int, int, int]
) -> None:
    centers = np.linspace(-1, 1, PIXELS)
    from_x = centers[None, :] - x  # [1, column]
    from_y = centers[::-1, None] - y  # [row, 1], y upwards
    picture[from_x**2 + from_y**2 < radius**2] = color
