"""Videos made from a suite's frames; rendering itself is tested with the environments."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from softmod.evaluate import run as evaluate
from softmod.report import video
from softmod.report.__main__ import run as report


def frames(shade: int, count: int) -> list[video.Frame]:
    """Make grey frames whose shade grows by one per frame."""
    return [np.full((48, 64, 3), shade + step, np.uint8) for step in range(count)]


class Env:
    """Environment whose frames show the step as a shade of grey; solved after `solved` steps."""

    def __init__(self, solved: int):
        self.solved, self.step_now = solved, 0

    def reset(self, goal: Any) -> Any:
        return np.zeros(3)

    def render(self) -> video.Frame:
        return np.full((48, 64, 3), self.step_now, np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool]:
        self.step_now += 1
        return np.zeros(3), 0.0, self.step_now >= self.solved

    def close(self) -> None:
        pass


@pytest.mark.parametrize("missing", ["imageio_ffmpeg", "imageio.v3"])
def test_without_the_encoder_one_line_names_the_package(missing: str, monkeypatch, capsys):
    """Before anything is evaluated: the checkpoints named here do not exist."""
    monkeypatch.setitem(sys.modules, missing, None)
    for command in (evaluate, report):
        assert command(["checkpoint=nowhere", "video=true"]) == 5
        assert (
            'video=true requires a package: pip install "imageio[ffmpeg]"'
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("program", ["/nonexistent", "/bin/false"])
def test_without_ffmpeg_nothing_is_evaluated(program: str, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    for command in (evaluate, report):
        assert command(["checkpoint=nowhere", "video=true"]) == 5
        assert "video=true requires ffmpeg" in capsys.readouterr().err


def test_a_video_of_each_task_and_a_gif_of_all(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        video, "Policy", lambda actor: SimpleNamespace(act=lambda obs, task: np.zeros((1, 1, 4)))
    )
    tasks = ("near", "far")
    suite: Any = SimpleNamespace(
        spec=SimpleNamespace(tasks=tasks, horizon=200),
        goals=lambda task: [np.zeros(3)],
        make=lambda task, render: Env((10, 100)[task]),
    )
    actor: Any = None
    shown: list[tuple[int, int]] = []
    write = video.write_gif

    def counted(pictures: Any, every: int, path: Path) -> None:
        shown.append((len(pictures), every))
        write(pictures, every, path)

    monkeypatch.setattr(video, "write_gif", counted)
    written = list(video.record(suite, actor, 1, tmp_path))
    frames_of_far = (99 + video.AFTER_SUCCESS) // video.EVERY + 1
    assert shown == [(frames_of_far // 2, 2)]  # every second frame, to stay below MOST_PICTURES
    assert [path.name for path in written] == ["near.mp4", "far.mp4", "tasks.gif"]
    assert len(imageio.imread(written[0])) == (9 + video.AFTER_SUCCESS) // video.EVERY + 1
    with Image.open(written[-1]) as gif:
        assert gif.size == (2 * video.THUMBNAIL, video.THUMBNAIL * 48 // 64)
        assert gif.info["loop"] == 0
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("L"))
    left, right = np.split(last, 2, axis=1)
    assert abs(int(left.mean()) - 28) < 6  # its last frame, while the other episode continued
    assert right.mean() > 100


def test_tasks_stand_in_rows_of_at_most_five():
    pictures = video.side_by_side([frames(10 * number, 1 + number) for number in range(7)])
    assert len(pictures) == 7
    assert pictures[0].shape == (2 * 48, 5 * 64, 3)
    assert pictures[6][48, 64, 0] == 66  # task 6 in its last moment
    assert pictures[6][0, 0, 0] == 0  # task 0 had one
    assert (pictures[0][48:, 2 * 64 :] == 255).all()
