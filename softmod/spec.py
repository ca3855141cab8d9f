"""Types shared by all parts: task sets, environments, rollouts and evaluation scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Goal = NDArray[np.float64]


@dataclass(frozen=True)
class EnvSpec:
    """The names and order of a set of tasks, and the sizes of observations, actions and episodes.

    With `frame > 0`, an observation consists of the state (`frame` numbers), the state one step
    earlier, and numbers that are constant within an episode. With `frame = 0`, it is the state. The
    replay stores each of these parts once.
    """

    tasks: tuple[str, ...]
    obs_dim: int
    action_dim: int
    horizon: int  # steps of an evaluation episode
    train_horizon: int | None = None  # steps of a training episode; None: same as in evaluation
    frame: int = 0

    @property
    def state_dim(self) -> int:
        """Return the size of the state."""
        return self.frame or self.obs_dim

    @property
    def episode_steps(self) -> int:
        """Return the number of steps of a training episode."""
        return self.train_horizon or self.horizon

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)


class TaskEnv(Protocol):
    """The environment of one task.

    A reset is a pure function of the goal. Episodes end only at their horizon.
    """

    def reset(self, goal: Goal) -> Floats:
        """Start an episode with this goal; return the observation `[obs_dim]`."""
        ...

    def step(self, action: Floats) -> tuple[Floats, float, bool]:
        """Apply an action `[action_dim]` in [-1, 1].

        Returns:
            The next observation `[obs_dim]`, the reward, and whether this step is a success.
        """
        ...

    def draw_goal(self, rng: np.random.Generator) -> Goal:
        """Draw a goal from the task's whole distribution, using `rng` only."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """Return an upright image `[height, width, 3]` of the scene.

        The environment must have been made with `render=True`.
        """
        ...

    def close(self) -> None: ...


class TaskSuite(Protocol):
    """A set of tasks: picklable, and cheap to send to the worker that builds the environments."""

    spec: EnvSpec

    def goals(self, task: int) -> Goal:
        """Return a task's goals for training and evaluation, `[num_goals, goal_dim]`."""
        ...

    def make(self, task: int, render: bool = False) -> TaskEnv:
        """Build a new environment of one task."""
        ...


class Episode(NamedTuple):
    """A finished training episode: its address and its result."""

    task: int
    copy: int
    episode: int
    episode_return: float
    success: bool
    rewards: tuple[float, ...] = ()  # one per step


class Fault(NamedTuple):
    """An episode that a physics error cut short.

    `step` is the rollout step at which the next episode began.
    """

    task: int
    copy: int
    episode: int
    step: int


@dataclass(frozen=True)
class UnderWay:
    """The unfinished training episodes, `[task, copy, ...]`, with all that re-execution needs."""

    episode: NDArray[np.int64]  # [task, copy]: episode number; -1 before the first episode
    steps: NDArray[np.int64]  # [task, copy]: steps taken; `episode_steps` if the episode is over
    actions: Floats  # [task, copy, step, action_dim]: zero for steps not taken yet
    obs: Floats  # [task, copy, obs_dim]: the latest observation

    @classmethod
    def none(cls, spec: EnvSpec, tasks: int, copies: int) -> UnderWay:
        """Return the state before the first episode of every environment."""
        shape = (tasks, copies)
        return cls(
            np.full(shape, -1, np.int64),
            np.full(shape, spec.episode_steps, np.int64),
            np.zeros((*shape, spec.episode_steps, spec.action_dim), np.float32),
            np.zeros((*shape, spec.obs_dim), np.float32),
        )


@dataclass
class Rollout:
    """The experience of one round; axes are `[task, copy, step, ...]`, numpy float32."""

    obs: Floats  # [task, copy, step, obs_dim]
    action: Floats  # [task, copy, step, action_dim]
    reward: Floats  # [task, copy, step]
    next_obs: Floats  # [task, copy, step, obs_dim]
    begins: NDArray[np.bool_]  # [task, copy, step]: True for the first step of an episode
    episodes: list[Episode] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    under_way: UnderWay | None = None  # at the end of the round; None if resuming is not needed
    seconds: float = 0.0  # collection time of the slowest worker

    @property
    def env_steps(self) -> int:
        """Return the environment steps over all tasks and copies."""
        return int(self.reward.size)


@dataclass(frozen=True)
class TaskScore:
    """The evaluation of one task: means over episodes of the deterministic policy."""

    task: str
    success_rate: float
    episode_return: float
    episodes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the score under the keys used in files."""
        return {
            "task": self.task,
            "success_rate": self.success_rate,
            "return": self.episode_return,
            "episodes": self.episodes,
        }


def mean_success(scores: Sequence[TaskScore]) -> float:
    """Return the mean success rate over tasks."""
    return sum(score.success_rate for score in scores) / len(scores)


def iqm(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the interquartile mean over the last two axes: `[..., seed, task]` to `[...]`.

    A quarter of the values, rounded down, is cut at each end.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle: NDArray[np.float64] = flat[..., cut : flat.shape[-1] - cut].mean(-1)
    return middle


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        folder: of the run; `softmod.load(folder)` is its policy.
        scores: of the last policy, one for each task.
        env_steps: that it was trained for, over all tasks.
        seconds: of training, with the evaluations between.
    """

    folder: Path
    scores: list[TaskScore]
    env_steps: int
    seconds: float

    @property
    def success_rate(self) -> float:
        """Return the mean success rate over the tasks."""
        return mean_success(self.scores)
