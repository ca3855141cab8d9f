"""Videos of the deterministic policy: an mp4 per task, and a GIF of all tasks side by side."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softmod.envs.episode import EvalEpisode
from softmod.errors import WorkerError, one_line
from softmod.networks.gaussian import Actor, Policy
from softmod.spec import TaskEnv, TaskSuite

Frame = NDArray[np.uint8]  # [height, width, 3]

FRAMES_PER_SECOND = 40
EVERY = 2  # env steps between two frames
AFTER_SUCCESS = 20  # env steps shown after the task is solved
THUMBNAIL = 144  # pixels, the width of a task in the GIF
MOST_PICTURES = 40  # in the GIF, to limit its size; short episodes are shown frame by frame
COLUMNS = 5
COLORS = 64


def encoder() -> Any:
    """Return imageio, which writes videos.

    Raises:
        WorkerError: The video extra is not installed, or ffmpeg cannot be run. Meta-World requires
            imageio, but not the package with the encoder.
    """
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg
    except ImportError as error:
        raise WorkerError('video=true requires a package: pip install "imageio[ffmpeg]"') from error
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        subprocess.run(command, check=True, capture_output=True)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise WorkerError(
            f"video=true requires ffmpeg ({one_line(error)}); IMAGEIO_FFMPEG_EXE names the program,"
            " and without it that of the package imageio-ffmpeg is used"
        ) from error
    return imageio


def record(suite: TaskSuite, actor: Actor, episodes: int, folder: Path) -> Iterator[Path]:
    """Play the first `episodes` goals of each task; write `<task>.mp4` and `tasks.gif`.

    Yields:
        The paths, as they are written.

    Raises:
        WorkerError: The video extra is not installed, or this machine cannot render.
    """
    imageio = encoder()
    policy = Policy(actor)
    small = list[list[Frame]]()
    for index, task in enumerate(suite.spec.tasks):
        env = suite.make(index, render=True)
        try:
            frames = [
                f
                for goal in suite.goals(index)[:episodes]
                for f in play(env, policy, index, goal, suite.spec.horizon)
            ]
        finally:
            env.close()
        path = folder / f"{task}.mp4"
        imageio.imwrite(
            path, np.stack(frames), fps=FRAMES_PER_SECOND, codec="libx264", macro_block_size=2
        )
        small.append([thumbnail(frame) for frame in frames])
        yield path
    path = folder / "tasks.gif"
    every = math.ceil(max(map(len, small)) / MOST_PICTURES)
    write_gif(side_by_side(small)[::-every][::-1], every, path)  # includes the last frame
    yield path


def thumbnail(frame: Frame) -> Frame:
    """Shrink a frame to `THUMBNAIL` pixels of width."""
    height = round(len(frame) * THUMBNAIL / frame.shape[1])
    return np.asarray(Image.fromarray(frame).resize((THUMBNAIL, height), Image.Resampling.LANCZOS))


def side_by_side(tasks: Sequence[Sequence[Frame]]) -> list[Frame]:
    """Lay out the tasks' frames, all of one size, in rows of at most `COLUMNS`.

    A finished task keeps its last frame.
    """
    columns = min(COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    height, width = tasks[0][0].shape[:2]
    pictures = []
    for moment in range(max(map(len, tasks))):
        picture = np.full((rows * height, columns * width, 3), 255, np.uint8)
        for number, frames in enumerate(tasks):
            top = number // columns * height
            left = number % columns * width
            picture[top : top + height, left : left + width] = frames[min(moment, len(frames) - 1)]
        pictures.append(picture)
    return pictures


def write_gif(pictures: Sequence[Frame], every: int, path: Path) -> None:
    """Write a looping GIF with `COLORS` colors.

    Each picture is shown for `every` frames, and the last one for a second more.
    """
    some = np.concatenate([pictures[0], pictures[len(pictures) // 2], pictures[-1]])
    palette = Image.fromarray(some).quantize(COLORS)
    images = [Image.fromarray(picture) for picture in pictures]
    first, *rest = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    duration = [1000 * every // FRAMES_PER_SECOND] * len(pictures)
    duration[-1] += 1000
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, optimize=False)


def play(
    env: TaskEnv, policy: Policy, task: int, goal: NDArray[np.float64], horizon: int
) -> Iterator[Frame]:
    """Yield an episode's frames, up to `AFTER_SUCCESS` steps after success or the horizon."""
    indices = np.array([task], np.int64)
    for episode in watched(EvalEpisode(env, goal, horizon)):
        if episode.steps % EVERY == 0:
            yield env.render()
        episode.step(policy.act(episode.obs[None, None], indices)[0, 0])


def watched(episode: EvalEpisode) -> Iterator[EvalEpisode]:
    """Yield an episode before each step, until `AFTER_SUCCESS` steps after success.

    It ends earlier at the horizon or if the physics breaks.
    """
    last = episode.horizon
    while episode.steps < last and not episode.broken:
        yield episode
        if episode.success:
            last = min(last, episode.steps + AFTER_SUCCESS)
