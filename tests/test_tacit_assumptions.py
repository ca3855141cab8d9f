"""What the code relies on without saying so: if a new version breaks one of these, it
is told here.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from metaworld import MT1
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

SEED = 0
CORNERS = ("corner", "corner2", "corner3", "corner4")


@pytest.fixture(scope="module")
def push() -> Any:
    return MT1("push-v3", seed=SEED)  # type: ignore[no-untyped-call]


def with_task(benchmark: Any, index: int = 0, **kwargs: Any) -> Any:
    env = benchmark.train_classes["push-v3"](**kwargs)
    env.set_task(benchmark.train_tasks[index])
    return env


def drawing(name: str, **kwargs: Any) -> Any:
    """A bare environment that draws its own goals."""
    env: Any = ALL_V3_ENVIRONMENTS[name](**kwargs)
    env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
    env.np_random = np.random.default_rng(SEED)
    return env


def test_versions() -> None:
    assert (version("metaworld"), version("mujoco"), mujoco.__version__) == (
        "3.1.1",
        "3.3.0",
        "3.3.0",
    )


def test_shapes_and_horizon(push: Any) -> None:
    env = with_task(push)
    assert env.max_path_length == 500
    assert env.action_space.shape == (4,)
    assert env.reset()[0].shape == (39,)


def test_the_goal_is_hidden_unless_a_benchmarks_task_shows_it(push: Any) -> None:
    bare = drawing("push-v3")
    assert bare._partially_observable
    assert not bare.reset()[0][36:].any()
    assert not with_task(push)._partially_observable
    assert with_task(push).reset()[0][36:].all()


def test_the_observation_space_is_cached_with_the_goal_at_zero() -> None:
    env = drawing("push-v3")
    assert not vars(env)["sawyer_observation_space"].high[36:].any()


def test_a_task_is_a_vector_of_the_reset_spaces_shape(push: Any) -> None:
    env = with_task(push)
    assert env._freeze_rand_vec
    assert env._last_rand_vec.shape == env._random_reset_space.shape == (6,)


def test_a_resets_seed_is_ignored(push: Any) -> None:
    env = with_task(push)
    assert np.array_equal(env.reset(seed=1)[0], env.reset(seed=2)[0])


def test_goals_differ_between_benchmarks_of_one_seed(push: Any) -> None:
    from metaworld import CustomML

    both = CustomML(["reach-v3", "push-v3"], [], seed=SEED)
    assert with_task(both, 50)._last_rand_vec.tolist() != with_task(push)._last_rand_vec.tolist()


@pytest.mark.bar(17)
def test_numpys_global_stream_is_a_random_state() -> None:
    state = np.random.get_state()
    np.random.seed(SEED)
    theirs = np.random.uniform([0, 1], [1, 2], size=2)
    np.random.set_state(state)
    assert np.array_equal(theirs, np.random.RandomState(SEED).uniform([0, 1], [1, 2], size=2))


@pytest.mark.bar(17)
def test_a_reset_is_a_pure_function_of_the_task(push: Any) -> None:
    actions = np.random.default_rng(SEED).uniform(-1, 1, (100, 4)).astype(np.float32)
    used, new = with_task(push, 1), with_task(push, 0)
    used.reset()
    for action in actions:
        used.step(-action)
    used.set_task(push.train_tasks[0])
    assert np.array_equal(used.reset()[0], new.reset()[0])
    for action in actions:
        a, b = used.step(action), new.step(action)
        assert np.array_equal(a[0], b[0])
        assert a[1] == b[1]


def test_nothing_terminates_and_stepping_past_the_end_raises(push: Any) -> None:
    env = with_task(push)
    env.max_path_length = 3
    env.reset()
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(ValueError, match="reset the env manually"):
        env.step(np.zeros(4, np.float32))


def test_mujoco_restarts_a_broken_simulation_and_only_counts_it(
    push: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # mujoco writes a log file
    env = with_task(push)
    counts = env.data.warning.number
    env.reset()
    obs, *_ = env.step(np.full(4, np.nan, np.float32))
    assert np.isfinite(obs).all()
    assert not env._did_see_sim_exception
    kinds = mujoco.mjtWarning
    assert [int(kinds.mjWARN_BADQPOS), int(kinds.mjWARN_BADQVEL), int(kinds.mjWARN_BADQACC)] == [
        4,
        5,
        6,
    ]
    assert counts[4:7].any()  # a live view
    env.reset()
    assert not counts.any()


def test_the_corner_cameras_hang_upside_down() -> None:
    env = drawing("push-v3")
    env.reset()
    ups = [env.data.cam_xmat[env.model.camera(name).id].reshape(3, 3)[2, 1] for name in CORNERS]
    assert all(up < 0 for up in ups)


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize(("reward", "succeeds"), [("v1", False), ("v2", True)])
@pytest.mark.parametrize("name", ["hand-insert-v3", "stick-push-v3"])
def test_reward_v1_never_reports_success_on_some_tasks(
    name: str, reward: str, succeeds: bool
) -> None:
    env = drawing(name, reward_function_version=reward)
    policy: Any = ENV_POLICY_MAP[name]()  # type: ignore[abstract]
    obs, _ = env.reset()
    env._freeze_rand_vec, env._partially_observable = True, False
    vars(env).pop("sawyer_observation_space", None)
    obs, _ = env.reset()
    successes = []
    for _ in range(300):
        obs, _, _, _, info = env.step(np.clip(policy.get_action(obs), -1, 1))
        successes.append(bool(info["success"]))
    assert any(successes) == succeeds
