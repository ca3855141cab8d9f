"""`python -m softmod.report`: invalid command lines, and figures and videos of routing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softmod.report import moving, routing
from softmod.report.__main__ import run
from softmod.report.routing import Rollouts
from softmod.report.video import AFTER_SUCCESS, EVERY, THUMBNAIL
from softmod.train import run as train
from tests.command.test_train import SMALL, here

__all__ = ["here"]


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        ([], 2, "sweep, runs, results, checkpoint: give one of them"),
        (["sweep=a: b, c", "runs=[runs]"], 2, "give one of them"),
        (["--video", "checkpoint=runs"], 2, "--video: unknown flag"),
        (["chekpoint=runs"], 2, "did you mean checkpoint"),
        (["level=2", "runs=[runs]"], 2, "level=2"),
        (["runs=[nowhere]"], 2, "nowhere"),
        (["checkpoint=nowhere"], 3, "nowhere"),
        (["sweep=no such sweep"], 2, "sweep=no such sweep: there is no MLflow store at"),
        (
            ["sweep=any", "uri=sqlite:////proc/version"],
            2,
            "sweep=any: sqlite:////proc/version cannot be read",
        ),
    ],
)
def test_an_invalid_line_fails_with_one_line(
    here: Path, capsys, arguments: list[str], code: int, answer: str
):
    assert run(arguments) == code
    printed = capsys.readouterr().err
    assert answer in printed
    assert printed.count("\n") == 1
    assert not (here / "report").exists()


def test_a_policy_that_does_not_route_and_a_run_that_is_not_over(here: Path, capsys):
    assert (
        train(
            [*(word for word in SMALL if word[:5] not in ("actor", "criti")), "model=mt_sac_small"]
        )
        == 0
    )
    (folder,) = here.glob("runs/*/seed_0")
    assert run([f"checkpoint={folder}"]) == 2
    assert "its network does not route" in capsys.readouterr().err
    (folder / "journal.jsonl").write_text(
        (folder / "journal.jsonl").read_text().replace("FINISHED", "KILLED")
    )
    assert run(["runs=[runs]"]) == 2
    assert "finished" in capsys.readouterr().err
    assert not (here / "report").exists()


def test_tasks_share_what_their_routes_have_in_common():
    """Compare one layer with two targets: equal, half equal, nothing in common."""

    def task(first: list[float], second: list[float]) -> Rollouts:
        return Rollouts("t", [np.tile(np.array([first, second]), (5, 1, 1))], 1, [5])

    rollouts = [task([1, 0], [1, 0]), task([1, 0], [0, 1]), task([0, 1], [0, 1])]
    np.testing.assert_allclose(
        routing.similarity(rollouts), [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    )
    assert rollouts[0].vectors().shape == (5, 4)


def test_a_course_is_the_mean_of_episodes_of_different_lengths():
    """One target, two sources: an episode of three steps, and one of a single step."""
    first = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    steps = np.concatenate([first, [[0.0, 1.0]]])[:, None]
    course = routing.course(Rollouts("t", [steps], 2, [3, 1]), 0)
    np.testing.assert_allclose(course[:, 0], np.linspace(0.5, 0, routing.POINTS))
    np.testing.assert_allclose(course.sum(1), 1)


class Env:
    """Environment with success after 20 steps; its frames are filled with the step number."""

    def __init__(self) -> None:
        self.steps = 0
        self.closed = False

    def reset(self, goal: Any) -> np.ndarray:
        self.steps = 0
        return np.zeros(3)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool]:
        self.steps += 1
        return np.zeros(3), 0.0, self.steps == 20

    def render(self) -> np.ndarray:
        return np.full((100, 100, 3), self.steps, np.uint8)

    def close(self) -> None:
        self.closed = True


def test_videos_show_routing_beside_the_robot_until_after_success(tmp_path: Path):
    env = Env()
    suite = SimpleNamespace(
        make=lambda task, render: env, spec=SimpleNamespace(horizon=500), goals=lambda task: [0]
    )
    routes = [np.array([[[[0.9, 0.1], [0.5, 0.5]]]])[0], np.array([[[[1.0, 0.0]]]])[0]]
    policy: Any = SimpleNamespace(
        suite=suite, tasks=["reach-v3"], routing=lambda obs, task: [layer[0] for layer in routes],
        act=lambda obs, task: np.zeros(4),
    )  # fmt: skip
    moments = list(moving.play(policy, 0, 0))
    assert env.closed
    steps = list(range(0, 20 + AFTER_SUCCESS, EVERY))
    assert [int(robot[0, 0, 0]) for robot, _ in moments] == steps
    robot, layers = moments[0]
    np.testing.assert_array_equal(layers[0], routes[0][0])
    frame = moving.beside(robot, moving.graph(layers, "reach-v3", "black"))
    assert frame.shape == (480, 100 + 480, 3)
    assert (frame[100:, :100] == 255).all()
    written, webp = moving.videos(policy, tmp_path)
    assert written.name == "routes_reach-v3.mp4"
    assert written.stat().st_size > 1_000
    assert webp.name == "routes.webp"
    with Image.open(webp) as pictures:
        assert pictures.size == (THUMBNAIL, 2 * THUMBNAIL)
        assert 1 < pictures.n_frames <= len(steps)
