"""Evaluation of a softmod policy in Meta-World's own vector environments, by its own evaluator.

import gymnasium as gym
from metaworld.evaluation import evaluation

policy = softmod.load("mt10")
envs = gym.make_vec("Meta-World/MT10", vector_strategy="sync", task_select="pseudorandom")
use_goals(envs, policy.suite)
evaluation(Agent(policy, envs), envs, num_episodes=50)
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import ArrayLike, NDArray

from softmod.envs.goals import environment_classes
from softmod.errors import ConfigError, near
from softmod.spec import Floats, Goal, TaskSuite


class Acts(Protocol):
    """A trained policy, as `softmod.load` returns it."""

    tasks: tuple[str, ...]

    def act(self, obs: ArrayLike, task: str | int) -> Floats:
        """Return the action for an observation of a task."""
        ...


class Agent:
    """A softmod policy as `metaworld.evaluation` expects an agent.

    The environments may have the tasks in any order, several times, and with or without a one-hot
    task behind the observation. Each row is computed by itself, so an action does not depend on
    the rows beside it.

    Args:
        policy: what `softmod.load` returns.
        envs: made by `gym.make_vec` of Meta-World's environments.

    Raises:
        ConfigError: the policy does not know one of the environments' tasks.
    """

    def __init__(self, policy: Acts, envs: VectorEnv) -> None:
        self.policy = policy
        self.tasks = task_names(envs)
        for name in self.tasks:
            if name not in policy.tasks:
                known = ", ".join(policy.tasks)
                raise ConfigError(
                    f"{name}: the policy was trained on {known}{near(name, policy.tasks)}"
                )

    def eval_action(self, observations: NDArray[np.float64]) -> Floats:
        """Return the actions `[env, action]` for observations `[env, obs]`."""
        rows = zip(observations, self.tasks, strict=True)
        return np.stack([self.policy.act(obs, task) for obs, task in rows])

    def reset(self, env_mask: NDArray[np.bool_]) -> None:
        """No-op: a policy keeps nothing between steps."""


def task_names(envs: VectorEnv) -> list[str]:
    """Return the task of each of Meta-World's vector environments."""
    names = {kind.__name__: name for name, kind in environment_classes().items()}
    return [names[name] for name in envs.get_attr("task_name")]  # type: ignore[attr-defined]


def use_goals(envs: VectorEnv, suite: TaskSuite) -> None:
    """Give Meta-World's vector environments the goals of a task set.

    Every reset takes another goal, in random order, so 50 episodes of a task take each of its 50
    goals once.

    Args:
        envs: made by `gym.make_vec` of Meta-World's environments with `task_select="pseudorandom"`.
        suite: task set of a policy, `policy.suite`.

    Raises:
        ConfigError: a task is not in the set, or the environments draw goals with replacement.
    """
    classes = environment_classes()
    goals = []
    for name in task_names(envs):
        if name not in suite.spec.tasks:
            raise ConfigError(f"{name}: not in the task set{near(name, suite.spec.tasks)}")
        own = suite.goals(suite.spec.tasks.index(name))
        goals.append([_task(name, classes[name], goal) for goal in own])
    try:
        envs.call("current_task_idx")  # type: ignore[attr-defined]
    except AttributeError as error:
        raise ConfigError(
            'goals would be drawn with replacement: make them with task_select="pseudorandom"'
        ) from error
    envs.set_attr("tasks", goals)  # type: ignore[attr-defined]
    envs.call("toggle_sample_tasks_on_reset", True)  # type: ignore[attr-defined]


def _task(name: str, kind: type, goal: Goal) -> Any:
    """Return a goal in the form of Meta-World's benchmarks, with the goal in the observation."""
    from metaworld.types import Task

    data = {"rand_vec": np.array(goal), "env_cls": kind, "partially_observable": False}
    return Task(env_name=name, data=pickle.dumps(data))
