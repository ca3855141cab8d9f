"""One evaluation episode: the same rules wherever a trained policy is watched or scored."""

from __future__ import annotations

from softmod.errors import PhysicsError
from softmod.spec import Floats, Goal, TaskEnv


class EvalEpisode:
    """An episode with a given goal. It is over at success, at the horizon, or where its physics
    breaks.

    Args:
        env: the task's environment; it is reset to the goal.
        goal: of the task.
        horizon: the most steps.

    Attributes:
        obs: the latest observation `[obs_dim]`.
        steps: taken so far.
        episode_return: the sum of rewards so far.
        success: whether it was reached.
        broken: whether its physics broke.
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
        """Return whether nothing counts any more; a video may show some steps beyond success."""
        return self.success or self.broken or self.steps >= self.horizon

    def step(self, action: Floats) -> None:
        """Act with `[action_dim]` in [-1, 1]."""
        try:
            self.obs, reward, success = self.env.step(action)
        except PhysicsError:
            self.broken = True
            return
        self.steps += 1
        self.episode_return += float(reward)
        self.success = self.success or success
