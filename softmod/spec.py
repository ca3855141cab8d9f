"""The few words that the parts share: what a task set is, what a rollout holds, what an evaluation
says.
"""

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
    """Describe a set of tasks to a learner: their names and order, and the sizes.

    `frame`: an observation is the state (so many numbers), the state one step before, and what does
    not change within an episode; 0: it is the state. The replay keeps each of them once.
    """

    tasks: tuple[str, ...]
    obs_dim: int
    action_dim: int
    horizon: int  # steps of an evaluation's episode
    train_horizon: int | None = None  # steps of a training episode; None: as in evaluation
    frame: int = 0

    @property
    def state_dim(self) -> int:
        """Numbers of the state."""
        return self.frame or self.obs_dim

    @property
    def episode_steps(self) -> int:
        """Steps of a training episode."""
        return self.train_horizon or self.horizon

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)


class TaskEnv(Protocol):
    """One task's environment.

    A reset is a pure function of the goal; an episode ends by its horizon.
    """

    def reset(self, goal: Goal) -> Floats:
        """Start an episode with this goal; the observation `[obs_dim]`."""
        ...

    def step(self, action: Floats) -> tuple[Floats, float, bool]:
        """Act with `[action_dim]` in [-1, 1]: the next observation `[obs_dim]`, the reward, success
        at this step.
        """
        ...

    def draw_goal(self, rng: np.random.Generator) -> Goal:
        """A goal from the task's whole distribution, drawn with `rng` alone."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """The scene as `[height, width, 3]`, the right way up; only for an environment made with
        `render=True`.
        """
        ...

    def close(self) -> None: ...


class TaskSuite(Protocol):
    """A set of tasks: picklable, cheap to send to a worker, builds environments where they are
    stepped.
    """

    spec: EnvSpec

    def goals(self, task: int) -> Goal:
        """The goals of a task that training and evaluation use, `[num_goals, goal_dim]`."""
        ...

    def make(self, task: int, render: bool = False) -> TaskEnv:
        """A new environment of one task."""
        ...


class Episode(NamedTuple):
    """A training episode that ended: whose it was and how it went."""

    task: int
    copy: int
    episode: int
    episode_return: float
    success: bool
    rewards: tuple[float, ...] = ()  # of every step


class Fault(NamedTuple):
    """An episode that was cut short since its physics broke, and the step of the rollout at which
    the next began.
    """

    task: int
    copy: int
    episode: int
    step: int


@dataclass(frozen=True)
class UnderWay:
    """The training episodes under way, `[task, copy, ...]`: enough to re-execute them."""

    episode: NDArray[np.int64]  # [task, copy]: its number; -1 before the first
    steps: NDArray[np.int64]  # [task, copy]: taken so far; all of them where it is over
    actions: Floats  # [task, copy, step, action_dim]: zero beyond its steps
    obs: Floats  # [task, copy, obs_dim]: the latest

    @classmethod
    def none(cls, spec: EnvSpec, tasks: int, copies: int) -> UnderWay:
        """Return the state before the first episodes."""
        shape = (tasks, copies)
        return cls(
            np.full(shape, -1, np.int64),
            np.full(shape, spec.episode_steps, np.int64),
            np.zeros((*shape, spec.episode_steps, spec.action_dim), np.float32),
            np.zeros((*shape, spec.obs_dim), np.float32),
        )


@dataclass
class Rollout:
    """A round's experience; axes are `[task, copy, step, ...]`, numpy float32."""

    obs: Floats  # [task, copy, step, obs_dim]
    action: Floats  # [task, copy, step, action_dim]
    reward: Floats  # [task, copy, step]
    next_obs: Floats  # [task, copy, step, obs_dim]
    begins: NDArray[np.bool_]  # [task, copy, step]: whether an episode begins with this step
    episodes: list[Episode] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    under_way: UnderWay | None = None  # at the round's end; None where nothing is to be resumed
    seconds: float = 0.0  # that the collecting took, in the slowest worker

    @property
    def env_steps(self) -> int:
        """Environment steps over all tasks and copies."""
        return int(self.reward.size)


@dataclass(frozen=True)
class TaskScore:
    """One task's evaluation: rates over episodes with the deterministic policy."""

    task: str
    success_rate: float
    episode_return: float
    episodes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "success_rate": self.success_rate,
            "return": self.episode_return,
            "episodes": self.episodes,
        }


def mean_success(scores: Sequence[TaskScore]) -> float:
    """Return the mean of the tasks' success rates."""
    return sum(score.success_rate for score in scores) / len(scores)


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
