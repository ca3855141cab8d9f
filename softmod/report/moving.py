"""Videos of rollouts with the routing graph of each step: an mp4 per task, a WebP of all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.episode import EvalEpisode
from softmod.report.figures import name_of
from softmod.report.routing import Layer, draw_graph
from softmod.report.video import (
    EVERY,
    FRAMES_PER_SECOND,
    THUMBNAIL,
    encoder,
    side_by_side,
    thumbnail,
    watched,
)
from softmod.system.drawing import Figure, FigureCanvasAgg, drawn
from softmod.tracking.figures import PALETTE, Image

INCHES = 4.8  # side of the graph, at 100 dots per inch
# of the moving picture of all tasks
MOST_PICTURES = 60
DURATION = 100  # milliseconds per picture
QUALITY = 70


def videos(policy: TrainedPolicy, folder: Path, goal: int = 0) -> Iterator[Path]:
    """Write `routes_<task>.mp4` with one rollout of each task, and `routes.webp` with all of them.

    Yields:
        The paths, as they are written.

    Raises:
        WorkerError: The video extra is not installed, or this machine cannot render.
    """
    imageio = encoder()
    small: list[list[Image]] = []
    for index, task in enumerate(policy.tasks):
        path = folder / f"routes_{task}.mp4"
        color = PALETTE[index % len(PALETTE)]
        moments = list(play(policy, index, goal))
        frames = [beside(robot, graph(layers, task, color)) for robot, layers in moments]
        imageio.imwrite(
            path, np.stack(frames), fps=FRAMES_PER_SECOND, codec="libx264", macro_block_size=2
        )
        small.append(
            [
                np.concatenate([thumbnail(robot), icon(layers, task, color)])
                for robot, layers in moments
            ]
        )
        yield path
    path = folder / "routes.webp"
    every = math.ceil(max(map(len, small)) / MOST_PICTURES)
    write_webp(side_by_side(small)[::-every][::-1], path)  # includes the last frame
    yield path


def write_webp(pictures: Sequence[Image], path: Path) -> None:
    """Write a looping WebP; the last picture is shown for a second more."""
    first, *rest = (PIL.Image.fromarray(picture) for picture in pictures)
    duration = [DURATION] * len(pictures)
    duration[-1] += 1000
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, quality=QUALITY)


def play(policy: TrainedPolicy, task: int, goal: int) -> Iterator[tuple[Image, list[Layer]]]:
    """Yield an episode's frames `[height, width, 3]` with the routing `[target, source]` per layer.

    The episode ends `AFTER_SUCCESS` steps after success, or at the horizon.
    """
    suite = policy.suite
    env = suite.make(task, render=True)
    try:
        for episode in watched(EvalEpisode(env, suite.goals(task)[goal], suite.spec.horizon)):
            if episode.steps % EVERY == 0:
                routes = policy.routing(episode.obs, task)
                yield env.render(), [np.asarray(layer, np.float64) for layer in routes]
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


@drawn
def icon(layers: list[Layer], task: str, color: str) -> Image:
    """Draw a small routing graph without numbers, `[THUMBNAIL, THUMBNAIL, 3]`."""
    figure = Figure(figsize=(THUMBNAIL / 100, THUMBNAIL / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.04, 0.02, 0.92, 0.84))
    draw_graph(axes, layers, color, numbers=False, dot=6.0)
    figure.suptitle(name_of(task), fontsize=8, y=0.99)
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
