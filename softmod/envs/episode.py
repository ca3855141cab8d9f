"""Evaluation episodes, with the same rules for scores, videos and single episodes."""

from __future__ import annotations

from softmod.errors import PhysicsError
from softmod.spec import Floats, Goal, TaskEnv


class EvalEpisode:
    """An episode with a given goal. It ends at success, at the horizon, or at a physics error.

    Args:
        env: the task's environment; it is reset to the goal.
        goal: a goal of the task.
        horizon: the largest number of steps.

    Attributes:
        obs: the latest observation `[obs_dim]`.
        steps: the number of steps taken.
        episode_return: the sum of rewards so far.
        success: whether a step was a success.
        broken: whether a physics error occurred.
    """

    def __init__(self, env: TaskEnv, goal: Goal, horizon: int) -> None:
        self.env = env
        self.horizon = horizon
        self.obs = env.reset(goal)
        self.steps = 0
        self.episode_return = 0.0
        self.success = False
        self.broken = False

    @property
    def over(self) -> bool:
        """Return whether the result is final; a video may show a few steps after success."""
        return self.success or self.broken or self.steps >= self.horizon

    def step(self, action: Floats) -> None:
        """Apply an action `[action_dim]` in [-1, 1]."""
        try:
            self.obs, reward, success = self.env.step(action)
        except PhysicsError:
            self.broken = True
            return
        self.steps += 1
        self.episode_return += float(reward)
        self.success = self.success or success
