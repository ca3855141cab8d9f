"""Videos of rollouts with the routing graph of each moment beside the robot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.episode import EvalEpisode
from softmod.errors import WorkerError
from softmod.report.figures import name_of
from softmod.report.routing import Layer, draw_graph
from softmod.report.video import EVERY, FRAMES_PER_SECOND, watched
from softmod.tracking.figures import PALETTE, Image

INCHES = 4.8  # of the graph, at 100 dots


def videos(policy: TrainedPolicy, folder: Path, goal: int = 0) -> Iterator[Path]:
    """`routes_<task>.mp4` for each task, one rollout; the paths, as they are written.

    Raises:
        WorkerError: the video extra is not installed, or nothing can be rendered here.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise WorkerError('video=true needs imageio: pip install -e ".[video]"') from error
    for index, task in enumerate(policy.tasks):
        path = folder / f"routes_{task}.mp4"
        frames = np.stack(list(play(policy, index, goal)))
        imageio.imwrite(path, frames, fps=FRAMES_PER_SECOND, codec="libx264", macro_block_size=2)
        yield path


def play(policy: TrainedPolicy, task: int, goal: int) -> Iterator[Image]:
    """Yield an episode's frames, robot and graph side by side, until a moment after it is over or
    the horizon.
    """
    suite = policy.suite
    color = PALETTE[task % len(PALETTE)]
    env = suite.make(task, render=True)
    try:
        for episode in watched(EvalEpisode(env, suite.goals(task)[goal], suite.spec.horizon)):
            if episode.steps % EVERY == 0:
                routes = policy.routing(episode.obs, task)
                layers = [np.asarray(layer, np.float64) for layer in routes]
                yield beside(env.render(), graph(layers, policy.tasks[task], color))
            episode.step(policy.act(episode.obs, task))
    finally:
        env.close()


def graph(layers: list[Layer], task: str, color: str) -> Image:
    """The graph of one moment, `[height, width, 3]`."""
    figure = Figure(figsize=(INCHES, INCHES), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw_graph(figure.add_axes((0.02, 0.02, 0.96, 0.88)), layers, color)
    figure.suptitle(name_of(task))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def beside(left: Image, right: Image) -> Image:
    """Two pictures in one, the lower one padded with white below."""
    height = max(len(left), len(right))
    padded = [
        np.pad(image, ((0, height - len(image)), (0, 0), (0, 0)), constant_values=255)
        for image in (left, right)
    ]
    return np.concatenate(padded, 1)
