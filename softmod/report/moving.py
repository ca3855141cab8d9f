"""Videos of rollouts with the routing graph of each step beside the robot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.episode import EvalEpisode
from softmod.errors import WorkerError
from softmod.report.figures import name_of
from softmod.report.routing import Layer, draw_graph
from softmod.report.video import EVERY, FRAMES_PER_SECOND, watched
from softmod.system.drawing import Figure, FigureCanvasAgg, drawn
from softmod.tracking.figures import PALETTE, Image

INCHES = 4.8  # side of the graph, at 100 dots per inch


def videos(policy: TrainedPolicy, folder: Path, goal: int = 0) -> Iterator[Path]:
    """Write `routes_<task>.mp4` with one rollout of each task; yield the paths.

    Raises:
        WorkerError: The video extra is not installed, or this machine cannot render.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise WorkerError('video=true requires imageio: pip install "imageio[ffmpeg]"') from error
    for index, task in enumerate(policy.tasks):
        path = folder / f"routes_{task}.mp4"
        frames = np.stack(list(play(policy, index, goal)))
        imageio.imwrite(path, frames, fps=FRAMES_PER_SECOND, codec="libx264", macro_block_size=2)
        yield path


def play(policy: TrainedPolicy, task: int, goal: int) -> Iterator[Image]:
    """Yield an episode's frames `[height, width, 3]`, robot and graph side by side.

    The episode ends `AFTER_SUCCESS` steps after success, or at the horizon.
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


@drawn
def graph(layers: list[Layer], task: str, color: str) -> Image:
    """Draw the routing graph of one step, `[height, width, 3]`."""
    figure = Figure(figsize=(INCHES, INCHES), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw_graph(figure.add_axes((0.02, 0.02, 0.96, 0.88)), layers, color)
    figure.suptitle(name_of(task))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def beside(left: Image, right: Image) -> Image:
    """Place two images side by side; the lower one is padded with white."""
    height = max(len(left), len(right))
    padded = [
        np.pad(image, ((0, height - len(image)), (0, 0), (0, 0)), constant_values=255)
        for image in (left, right)
    ]
    return np.concatenate(padded, 1)
