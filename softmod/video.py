"""Videos: the deterministic policy in each task, an mp4 per task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softmod.errors import WorkerError
from softmod.networks.policy import Actor, Policy
from softmod.types import TaskEnv, TaskSuite

FRAMES_PER_SECOND = 40
EVERY = 2  # env steps between two frames
AFTER_SUCCESS = 20  # env steps shown after the task is solved


def record(suite: TaskSuite, actor: Actor, episodes: int, folder: Path) -> Iterator[Path]:
    """Play the first `episodes` goals of each task and write `<task>.mp4`; the paths, as they are written.

    Raises:
        WorkerError: the video extra is not installed, or nothing can be rendered here.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise WorkerError('video=true needs imageio: pip install "softmod[video]"') from error
    policy = Policy(actor)
    for index, task in enumerate(suite.spec.tasks):
        env = suite.make(index, render=True)
        try:
            frames = [
                f for goal in suite.goals(index)[:episodes] for f in play(env, policy, index, goal, suite.spec.horizon)
            ]
        finally:
            env.close()
        path = folder / f"{task}.mp4"
        imageio.imwrite(path, np.stack(frames), fps=FRAMES_PER_SECOND, codec="libx264", macro_block_size=2)
        yield path


def play(
    env: TaskEnv, policy: Policy, task: int, goal: NDArray[np.float64], horizon: int
) -> Iterator[NDArray[np.uint8]]:
    """The frames of an episode, until a moment after success or the horizon."""
    obs, until = env.reset(goal), horizon
    indices = np.array([task], np.int64)
    for step in range(horizon):
        if step % EVERY == 0:
            yield env.render()
        if step >= until:
            return
        obs, _, success = env.step(policy.act(obs[None, None], indices)[0, 0])
        if success:
            until = min(until, step + AFTER_SUCCESS)
