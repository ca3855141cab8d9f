"""The fast environments equal Meta-World's bit for bit, on a part of `benchmarks.proof`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from benchmarks import proof
from benchmarks.proof import DifferenceError, Pair, policy
from softmod.envs import metaworld_fast
from softmod.envs import metaworld_scalars as scalars
from softmod.envs.goals import environment_classes
from softmod.envs.metaworld import MetaWorld
from softmod.envs.metaworld_fast import FastSawyer, fast_class
from softmod.envs.tasks import MT50
from softmod.spec import Floats

# --- whole environments ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Constant")  # scripted actions exceed [-1, 1]
@pytest.mark.parametrize("task", MT50)
def test_equal_to_the_bit(task: str) -> None:
    pair = Pair(task)
    goal = pair.goal(0)
    assert pair.compare(goal, "v1", policy("random", task, 1), 8).steps == 8
    assert pair.compare(goal, "v2", policy("random", task, 0), 8).steps == 8
    assert pair.compare(goal, "v1", policy("scripted", task, 1), 20).steps == 20
    assert pair.compare(pair.goal(1), "v2", policy("scripted", task, 0), 40).steps == 40


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("task", ["pick-place-v3", "push-v3"])
def test_equal_while_the_gripper_holds_something(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, held = Pair(task), []
    touching = FastSawyer.touching_object

    def watched(env: Any, geom: int) -> bool:
        held.append(touching(env, geom))
        return held[-1]

    monkeypatch.setattr(FastSawyer, "touching_object", watched)
    for reward in ("v1", "v2"):
        assert pair.compare(pair.goal(0), reward, policy("scripted", task, 0), 150).successes
    assert 40 < sum(held) < 260  # both results occur often


def test_the_switch() -> None:
    theirs, ours = (MetaWorld(["push-v3"], fast=fast).make(0) for fast in (False, True))
    goal = theirs.draw_goal(np.random.default_rng(0))
    assert theirs.reset(goal).tolist() == ours.reset(goal).tolist()
    for action in np.random.default_rng(1).uniform(-1.5, 1.5, (30, 4)).astype(np.float32):
        assert [np.array(part).tolist() for part in theirs.step(action)] == [
            np.array(part).tolist() for part in ours.step(action)
        ]
    assert not isinstance(theirs._env, FastSawyer)
    assert isinstance(ours._env, FastSawyer)


def test_nothing_of_metaworld_is_patched() -> None:
    base, tools = dict(vars(SawyerXYZEnv)), dict(vars(reward_utils))
    cls = environment_classes()["door-open-v3"]
    own = dict(vars(cls))
    fast = fast_class(cls)
    assert fast is fast_class(cls)
    assert issubclass(fast, cls)
    assert fast.__name__ == cls.__name__
    assert (base, tools, own) == (
        dict(vars(SawyerXYZEnv)),
        dict(vars(reward_utils)),
        dict(vars(cls)),
    )


@pytest.mark.parametrize("task", ["push-v3", "door-open-v3", "faucet-close-v3", "window-close-v3"])
def test_the_hands_way_home_is_simulated_once_per_scene(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, simulated = Pair(task), []
    go_home = type(pair.fast)._go_home
    monkeypatch.setattr(
        type(pair.fast), "_go_home", lambda env, steps: (simulated.append(1), go_home(env, steps))
    )
    for number in (0, 1, 0, 1, 0):  # each from the end of the last episode
        pair.compare(pair.goal(number), "v2", policy("scripted", task, number), 30)
    assert 1 <= len(simulated) <= 2  # once if the scene is the same for all goals


def test_remembered_ways_home_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld_fast, "MOST_HOMES", 2)
    pair = Pair("door-open-v3")
    for number in range(5):
        pair.compare(pair.goal(number), "v2", policy("random", "door-open-v3", number), 2)
    assert 1 <= len(pair.fast._homes) <= 2


def test_past_the_end_both_raise() -> None:
    pair = Pair("reach-v3")
    tally = pair.compare(pair.goal(0), "v2", policy("random", "reach-v3", 0), 501)
    assert (tally.steps, tally.raised) == (501, 1)


def test_what_cannot_be_stepped() -> None:
    env: Any = fast_class(environment_classes()["reach-v3"])()
    with pytest.raises(RuntimeError, match="set_task before using env.step"):
        env.step(np.zeros(4))
    with pytest.raises(RuntimeError, match="set_task before using env.evaluate_state"):
        env.evaluate_state(np.zeros(39), np.zeros(4))
    env._set_task_called = True
    with pytest.raises(AssertionError, match="got 3"):
        env.step(np.zeros(3))


# --- seen failing ---------------------------------------------------------------------------------

BENT = {
    "step 1: reward differs": (metaworld_fast, "HALF", np.full(3, np.nextafter(0.5, 1))),
    "reset: observation differs at \\[": (
        metaworld_fast,
        "HAND_DOWN",
        np.array([1.0, 0.0, 1.0 + 1e-15, 0.0]),
    ),
    "step \\d+: reward differs": (
        scalars,
        "_long_tail_stretch",
        lambda value: float(np.nextafter(3.0, 4)),
    ),
}


@pytest.mark.parametrize("told", BENT)
def test_a_constant_off_by_a_bit_is_found(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BENT[told])
    pair = Pair("push-v3")
    with pytest.raises(DifferenceError, match=f"push-v3, reward v2, {told}"):
        pair.compare(pair.goal(0), "v2", policy("random", "push-v3", 0), 20)


def test_a_remembered_scene_that_is_slightly_off_is_found() -> None:
    pair = Pair("push-v3")
    pair.compare(pair.goal(0), "v2", policy("random", "push-v3", 0), 2)
    for home in pair.fast._homes.values():
        home *= 1 + 1e-13
    with pytest.raises(DifferenceError, match="push-v3, reward v2, reset: observation differs"):
        pair.compare(pair.goal(0), "v2", policy("random", "push-v3", 0), 2)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--tasks", "reach-v3", "--goals", "1", "--steps", "3"]
    assert proof.main(few) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal to the bit"
    assert proof.main(["--tasks", "reach-v2"]) == 2
    assert "reach-v3" in capsys.readouterr().err
    monkeypatch.setattr(metaworld_fast, "HALF", np.full(3, 0.5 + 1e-15))
    assert proof.main([*few, "--reward", "v2"]) == 1
    assert "reach-v3, reward v2, step 1: reward differs" in capsys.readouterr().err


# --- single functions -----------------------------------------------------------------------------

RNG = np.random.default_rng(0)


def outcome(function: Any, *args: Any, **options: Any) -> Any:
    """Return the type and bits of a function's result, or the type of its exception."""
    try:
        with np.errstate(all="ignore"):
            result = function(*args, **options)
    except Exception as error:
        return type(error)
    return type(result), np.asarray(result).dtype, np.shape(result), np.asarray(result).tobytes()


VECTORS: list[Any] = [
    *RNG.normal(size=(200, 3)), *RNG.normal(size=(20, 2)), *RNG.normal(size=(20, 1)),
    *RNG.normal(size=20),
    np.arange(3), np.ones(3, np.float32), np.ones((2, 3)), np.zeros(0), [3.0, 4.0], 2.0, -3,
    np.float32(0.3),
    RNG.normal(size=(4, 3))[:, 1], RNG.normal(size=9)[::-2], np.array([np.nan, 1, 2]), np.full(3,
                                                                                               1e200),
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"ord": 2}, {"ord": 1}, {"axis": 0}])
def test_norm(options: dict[str, int]) -> None:
    for vector in VECTORS:
        assert outcome(scalars.norm, vector, **options) == outcome(
            np.linalg.norm, vector, **options
        ), vector


NUMBERS: list[Any] = [
    *RNG.uniform(-1, 2, 40), *RNG.uniform(-1, 2, 20).tolist(), 0.0, -0.0, 0.05, 1, 0,
    np.float32(0.3), 1e200, -1e-300,
    float("nan"), float("inf"), np.float64("nan"), np.array(0.3), np.array([0.3, 0.01]),
]  # fmt: skip


@pytest.mark.parametrize(
    "bounds", [(0, 0.05), (0.05, 0.5), (0.0, float("inf")), (1, 0), (0.3, 0.3)]
)
@pytest.mark.parametrize("sigmoid", ["long_tail", "gaussian", "linear", "cosine", "unknown"])
def test_tolerance(bounds: tuple[float, float], sigmoid: Any) -> None:
    for x in NUMBERS:
        for margin in (
            0.4,
            np.float64(0.1),
            0,
            0.0,
            -1.0,
            1,
            np.float64("nan"),
            5e-324,
            np.array(0.4),
        ):
            case = {"x": x, "bounds": bounds, "margin": margin, "sigmoid": sigmoid}
            assert outcome(scalars.tolerance, **case) == outcome(reward_utils.tolerance, **case), (
                case
            )


def test_clip_and_hstack() -> None:
    for x in [*NUMBERS, np.float32(-2), np.float32(1), *RNG.normal(size=9).astype(np.float32)]:
        for bounds in ((-1, 1), (0.0, 1.0), (np.float64(0), 1)):
            assert outcome(scalars.clip, x, *bounds) == outcome(np.clip, x, *bounds), (x, bounds)
    for pair in (
        (np.ones(3), np.zeros(2)),
        (np.ones(3), 2.0),
        (np.ones((2, 1)), np.ones((2, 2))),
        [np.arange(2)] * 2,
    ):
        assert outcome(scalars.hstack, pair) == outcome(np.hstack, pair)


def test_rect_prism_tolerance() -> None:
    corners: list[Floats] = [*RNG.uniform(-1, 1, (6, 3)), np.zeros(3), np.array([0.0, 0.5, 0.5])]
    for zero in corners:
        for one in corners:
            for x in (*RNG.uniform(-1, 1, (20, 3)), zero, (zero + one) / 2):
                case = (x, zero, one)
                assert outcome(scalars.rect_prism_tolerance, *case) == outcome(
                    reward_utils.rect_prism_tolerance, *case
                )


def test_quaternion() -> None:
    import mujoco

    axes = [*np.eye(4), *(np.eye(4) + np.roll(np.eye(4), 1, 0)), *RNG.normal(size=(500, 4))]
    axes += [axis * [1, tiny, 1, tiny] for axis in axes[8:60] for tiny in (1e-3, 1e-8)]
    for axis in axes:
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, axis / np.linalg.norm(axis))
        theirs, ours = (
            kind.from_matrix(matrix.reshape(3, 3)).as_quat()
            for kind in (Rotation, scalars.Quaternion)
        )
        assert ours.tobytes() == theirs.tobytes()
