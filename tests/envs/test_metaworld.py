from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmod.envs import metaworld as module
from softmod.envs.metaworld import MetaWorld, MetaWorldEnv
from softmod.envs.tasks import MT10, MT25, MT50
from softmod.errors import ConfigError, WorkerError
from softmod.spec import Floats, Goal
from tests.envs.conftest import global_stream

REACH, PUSH, WINDOW = MT10.index("reach-v3"), MT10.index("push-v3"), MT10.index("window-open-v3")


def actions(steps: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32)


def play(env: MetaWorldEnv, goal: Goal, steps: int, seed: int = 0) -> list[Any]:
    """Return all results of an episode as plain numbers, for exact comparison."""
    seen: list[Any] = [env.reset(goal).tolist()]
    for action in actions(steps, seed):
        obs, reward, success = env.step(action)
        seen.append((obs.tolist(), reward, success))
    return seen


def play_theirs(mt10: Any, task: int, goal: int, reward: str, steps: int) -> list[Any]:
    """Return the same results from Meta-World's own environment."""
    name = MT10[task]
    env = mt10.train_classes[name](reward_function_version=reward)
    env.set_task([one for one in mt10.train_tasks if one.env_name == name][goal])
    seen: list[Any] = [env.reset()[0].astype(np.float32).tolist()]
    for action in actions(steps):
        obs, value, _, _, info = env.step(action)
        seen.append((obs.astype(np.float32).tolist(), float(value), bool(info["success"])))
    return seen


@pytest.mark.parametrize(
    ("task", "goal", "reward"),
    [(REACH, 0, "v2"), (PUSH, 7, "v2"), (PUSH, 7, "v1"), (WINDOW, 49, "v2")],
)
def test_equal_to_plain_metaworld(mt10: Any, task: int, goal: int, reward: str) -> None:
    suite = MetaWorld(MT10, reward=reward)
    ours = play(suite.make(task), suite.goals(task)[goal], 500)
    assert ours == play_theirs(mt10, task, goal, reward, 500)


def test_shapes_and_types() -> None:
    suite = MetaWorld(MT10)
    env = suite.make(REACH)
    obs = env.reset(suite.goals(REACH)[3])
    after, reward, success = env.step(np.zeros(4, np.float32))
    assert obs.shape == after.shape == (39,)
    assert obs.dtype == after.dtype == np.float32
    assert (type(reward), type(success)) == (float, bool)
    assert np.allclose(obs[36:], suite.goals(REACH)[3][3:])  # the goal is seen


@pytest.mark.bar(17)
@pytest.mark.parametrize("name", ["push-v3", "basketball-v3", "faucet-close-v3"])
def test_a_reset_is_a_pure_function_of_the_goal(name: str) -> None:
    suite = MetaWorld(MT50)
    used, new = (suite.make(MT50.index(name)) for _ in range(2))
    goals = [used.draw_goal(np.random.default_rng(seed)) for seed in range(2)]
    play(used, goals[0], 37, seed=5)
    used.draw_goal(np.random.default_rng(9))
    assert play(used, goals[1], 60) == play(new, goals[1], 60)


@pytest.mark.control(17)
def test_a_reset_that_leaves_something_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a leaked state, the previous state would be that of the last episode."""
    from softmod.envs import metaworld_fast

    reset = metaworld_fast.FastSawyer.reset

    def forgetful(env: Any, **options: Any) -> Any:
        before = getattr(env, "_prev_obs", None)
        obs, info = reset(env, **options)
        if before is not None:
            env._prev_obs = before
        return obs, info

    monkeypatch.setattr(metaworld_fast.FastSawyer, "reset", forgetful)
    suite = MetaWorld(MT50)
    used, new = (suite.make(REACH) for _ in range(2))
    goal = used.draw_goal(np.random.default_rng(0))
    play(used, goal, 37, seed=5)
    assert play(used, goal, 60) != play(new, goal, 60)


@pytest.mark.bar(17)
@pytest.mark.parametrize("name", ["reach-v3", "shelf-place-v3", "lever-pull-v3"])
def test_draw_goal_is_a_function_of_its_stream(name: str) -> None:
    suite = MetaWorld(MT50)
    used, new = (suite.make(MT50.index(name)) for _ in range(2))
    before = global_stream()
    goal = new.draw_goal(np.random.default_rng(3))
    play(used, goal, 20)
    assert np.array_equal(used.draw_goal(np.random.default_rng(3)), goal)
    assert not np.array_equal(used.draw_goal(np.random.default_rng(4)), goal)
    assert global_stream() == before


def test_draw_goal_draws_what_a_whole_reset_draws() -> None:
    env = MetaWorld(["shelf-place-v3"]).make(0)
    goals = [env.draw_goal(rng) for rng in [np.random.default_rng(3)] for _ in range(5)]
    plain, rng = env._env, np.random.default_rng(3)
    plain._freeze_rand_vec, plain.np_random = False, rng
    for goal in goals:
        plain.reset()
        assert np.array_equal(plain._last_rand_vec, goal)


def test_goal_modes() -> None:
    modes = {
        mode: MetaWorld(MT10, goals=mode).goals(PUSH) for mode in ("benchmark", "fixed", "random")
    }
    assert modes["benchmark"].shape == (50, 6)
    assert modes["benchmark"].dtype == np.float64
    assert np.array_equal(modes["fixed"], modes["benchmark"][:1])
    assert np.array_equal(modes["random"], modes["benchmark"])


def test_whose_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def goals(benchmark: str, seed: int) -> dict[str, Goal]:
        asked.append((benchmark, seed))
        return dict.fromkeys(MT50, np.zeros((50, 3)))

    monkeypatch.setattr(module, "benchmark_goals", goals)
    for tasks in (MT10, MT10[::-1], MT25, MT50, MT10[:9], ["push-v3"]):
        MetaWorld(tasks, goal_seed=2).goals(0)
    assert asked == [(name, 2) for name in ("mt10", "mt10", "mt25", "mt50", "mt50", "mt50")]


def test_horizon() -> None:
    suite = MetaWorld(["reach-v3"], horizon=7)
    env = suite.make(0)
    goal = env.draw_goal(np.random.default_rng(0))
    with pytest.raises(WorkerError, match="reach-v3: no episode is running"):
        env.step(np.zeros(4, np.float32))
    for _ in range(2):
        play(env, goal, 7)
        with pytest.raises(WorkerError, match=r"the horizon is 7\), reset it first"):
            env.step(np.zeros(4, np.float32))


@pytest.mark.bar(14)
def test_physics_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # mujoco writes a log file
    env = MetaWorld(["reach-v3"]).make(0)
    goal = env.draw_goal(np.random.default_rng(0))
    play(env, goal, 4)
    with pytest.raises(
        WorkerError, match="reach-v3: the physics broke at step 5 of an episode: MuJoCo found bad"
    ):
        env.step(np.full(4, np.nan, np.float32))
    play(env, goal, 4)  # a reset cures it


@pytest.mark.control(14)
def test_without_the_check_what_broke_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MuJoCo restarts the simulation silently: the robot moves, and the episode continues."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MetaWorldEnv, "_checked", lambda self, obs: obs.astype(np.float32))
    env = MetaWorld(["reach-v3"]).make(0)
    env.reset(env.draw_goal(np.random.default_rng(0)))
    before = env.step(np.zeros(4, np.float32))[0]
    after = env.step(np.full(4, np.nan, np.float32))[0]
    assert not np.isfinite(after).all() or np.abs(after[:3] - before[:3]).max() > 0.1


@pytest.mark.bar(14)
def test_non_finite_observation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MetaWorld(["reach-v3"]).make(0)
    env.reset(env.draw_goal(np.random.default_rng(0)))
    monkeypatch.setattr(
        env._env, "step", lambda action: (np.full(39, np.inf), 0.0, False, False, {"success": 0.0})
    )
    with pytest.raises(WorkerError, match="at step 1 of an episode: the observation is not finite"):
        env.step(np.zeros(4, np.float32))


def test_goal_of_the_wrong_size() -> None:
    with pytest.raises(WorkerError, match=r"expected a goal of shape \(6,\), got \(3,\)"):
        MetaWorld(["reach-v3"]).make(0).reset(np.zeros(3))


def test_suite_travels() -> None:
    suite = MetaWorld(MT10, goals="fixed")
    assert len(pickle.dumps(suite)) < 1000
    goals = suite.goals(PUSH)
    copy = pickle.loads(pickle.dumps(suite))
    assert len(pickle.dumps(suite)) < 50_000
    assert copy.spec == suite.spec
    assert np.array_equal(copy.goals(PUSH), goals)


def test_wrong_words() -> None:
    for wrong in ({"goals": "some"}, {"reward": "v3"}, {"horizon": 501}, {"horizon": 0}):
        with pytest.raises(ConfigError, match=f"env.{next(iter(wrong))} is "):
            MetaWorld(["reach-v3"], **wrong)
    with pytest.raises(ConfigError, match="toy-reach"):
        MetaWorld(["toy-reach"])


def test_building_a_suite_imports_no_metaworld() -> None:
    code = "import sys; from softmod.envs.metaworld import MetaWorld; MetaWorld(['push-v3'])"
    code += "; print(sorted({'metaworld', 'mujoco', 'torch'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.fixture
def rendering(monkeypatch: pytest.MonkeyPatch) -> MetaWorldEnv:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    try:
        return MetaWorld(["reach-v3"]).make(0, render=True)
    except WorkerError as error:
        pytest.skip(str(error))


def test_two_environments_render_side_by_side(rendering: MetaWorldEnv) -> None:
    goal = rendering.draw_goal(np.random.default_rng(0))
    rendering.reset(goal)
    picture = rendering.render()
    assert picture.shape == (480, 480, 3)
    assert picture.dtype == np.uint8
    other = MetaWorld(["drawer-open-v3"]).make(0, render=True)
    assert not np.array_equal(other.render(), picture)
    assert np.array_equal(rendering.render(), picture)
    other.close()
    other.close()
    assert np.array_equal(rendering.render(), picture)
    rendering.close()
    with pytest.raises(WorkerError, match="cannot render"):
        rendering.render()


def test_the_picture_stands_upright(rendering: MetaWorldEnv) -> None:
    rendering.reset(rendering.draw_goal(np.random.default_rng(0)))
    picture = rendering.render().astype(float)
    red, green, blue = (picture[:, :, channel] for channel in range(3))
    table = (red > blue + 25) & (green > blue + 10)  # brown wood
    rows, columns = np.nonzero(table)
    arm = (red > 100) & (green < 60)
    rendering.close()
    assert rows.mean() > 280  # the table is below
    assert np.nonzero(arm)[1].mean() < 200 < columns.mean()  # the robot is on the left


def test_rendering_needs_to_be_asked_for() -> None:
    with pytest.raises(WorkerError, match="made without render=True"):
        MetaWorld(["reach-v3"]).make(0).render()


def test_no_egl_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with pytest.raises(WorkerError, match="MUJOCO_GL=egl .*libegl1 and libgl1-mesa-dri") as failure:
        MetaWorld(["reach-v3"]).make(0, render=True)
    assert "\n" not in str(failure.value)
    assert "MUJOCO_GL" not in os.environ


def test_a_driver_that_cannot_be_loaded_ends_only_videos() -> None:
    code = """
import os
from softmod.envs.metaworld import MetaWorld
suite = MetaWorld(["reach-v3"])
suite.make(0).close()
print(os.environ["MUJOCO_GL"])
suite.make(0, render=True)
"""
    environment = {**os.environ, "MUJOCO_GL": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "nonsense\n", done.stderr
    assert "WorkerError: cannot render with MUJOCO_GL=nonsense" in done.stderr
