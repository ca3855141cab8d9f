from __future__ import annotations

import pickle

import numpy as np
import pytest

from softmod.envs.tasks import TOY_TASKS
from softmod.envs.toy import SPEED, Toy, ToyEnv
from softmod.errors import ConfigError, WorkerError
from softmod.spec import Floats
from tests.envs.conftest import global_stream

SUITE = Toy(TOY_TASKS)
TASKS = pytest.mark.parametrize("task", range(len(TOY_TASKS)), ids=TOY_TASKS)


def script(task: str, obs: Floats) -> Floats:
    """Return the action that moves straight to the task's target."""
    point, puck, goal, held = obs[:2], obs[4:6], obs[6:8], bool(obs[8])
    target = {
        "toy-reach": goal,
        "toy-opposite": -goal,
        "toy-touch": puck,
        "toy-carry": goal if held else puck,
    }[task]
    action: Floats = np.clip((target - point) / SPEED, -1, 1)
    return action


def play(
    env: ToyEnv, task: str, goal: np.ndarray, steps: int = 50
) -> tuple[list[float], list[bool]]:
    obs = env.reset(goal)
    outcomes = []
    for _ in range(steps):
        obs, reward, success = env.step(script(task, obs))
        outcomes.append((reward, success))
    rewards, successes = zip(*outcomes, strict=True)
    return list(rewards), list(successes)


@TASKS
def test_every_goal_is_reached_in_time(task: int) -> None:
    env = SUITE.make(task)
    for goal in SUITE.goals(task):
        rewards, successes = play(env, TOY_TASKS[task], goal)
        assert successes[-1]
        assert not successes[0]
        assert all(0 < reward <= 10 for reward in rewards)
        assert rewards[-1] > 9.5 > rewards[0]


@TASKS
def test_the_way_to_the_target_is_worth_more_than_standing_still_and_than_the_way_back(
    task: int,
) -> None:
    env = SUITE.make(task)
    for goal in SUITE.goals(task)[:10]:
        forward = script(TOY_TASKS[task], env.reset(goal))
        worth = [
            env.step(scale * forward)[1] for scale in (1, 0, -1) if env.reset(goal) is not None
        ]
        assert worth[0] > worth[1] > worth[2]


@TASKS
def test_the_script_of_another_task_fails(task: int) -> None:
    """All tasks start with the same observation, so a policy needs the task."""
    env, name = SUITE.make(task), TOY_TASKS[task]
    for other in TOY_TASKS:
        solved = [any(play(env, other, goal)[1]) for goal in SUITE.goals(task)]
        passing = {("toy-touch", "toy-carry")}  # who carries the puck has touched it
        assert all(solved) == (other == name or (name, other) in passing)


def test_first_observations_do_not_tell_the_task() -> None:
    goal = SUITE.goals(0)[0]
    first = [SUITE.make(task).reset(goal).tolist() for task in range(4)]
    assert first == [first[0]] * 4


@TASKS
def test_a_reset_is_a_pure_function_of_the_goal(task: int) -> None:
    used, goals = SUITE.make(task), SUITE.goals(task)
    play(used, TOY_TASKS[task], goals[0], 33)
    used.draw_goal(np.random.default_rng(0))
    assert play(used, TOY_TASKS[task], goals[1]) == play(
        SUITE.make(task), TOY_TASKS[task], goals[1]
    )


def test_shapes_and_types() -> None:
    env = SUITE.make(3)
    obs = env.reset(SUITE.goals(3)[0])
    after, reward, success = env.step(np.ones(2, np.float32))
    assert obs.shape == after.shape == (9,)
    assert obs.dtype == after.dtype == np.float32
    assert (type(reward), type(success)) == (float, bool)
    assert (SUITE.spec.obs_dim, SUITE.spec.action_dim) == (9, 2)


def test_actions_are_clipped_and_the_border_holds() -> None:
    env = SUITE.make(0)
    env.reset(SUITE.goals(0)[0])
    for _ in range(20):
        obs, _, _ = env.step(np.array([50, -50], np.float32))
    assert obs.tolist()[:4] == [1, -1, 0, 0]


def test_goals() -> None:
    goals = SUITE.goals(0)
    assert goals.shape == (50, 4)
    assert np.array_equal(Toy(TOY_TASKS).goals(0), goals)
    # Goals are independent of the other tasks in the set.
    assert np.array_equal(Toy(["toy-carry", "toy-reach"]).goals(1), goals)
    assert np.array_equal(Toy(TOY_TASKS, goals="fixed").goals(0), goals[:1])
    assert np.array_equal(Toy(TOY_TASKS, goals="random").goals(0), goals)
    assert not np.array_equal(Toy(TOY_TASKS, goal_seed=1).goals(0), goals)
    assert not np.array_equal(SUITE.goals(1), goals)


def test_draw_goal_is_a_function_of_its_stream() -> None:
    before = global_stream()
    draws = [SUITE.make(task).draw_goal(np.random.default_rng(5)).tolist() for task in (0, 3)]
    assert draws[0] == draws[1]
    assert global_stream() == before


def test_horizon() -> None:
    env = Toy(["toy-reach"], horizon=3).make(0)
    with pytest.raises(WorkerError, match="no episode is running"):
        env.step(np.zeros(2, np.float32))
    play(env, "toy-reach", SUITE.goals(0)[0], 3)
    with pytest.raises(WorkerError, match=r"toy-reach: .*horizon is 3\), reset it first"):
        env.step(np.zeros(2, np.float32))


def test_non_finite_action() -> None:
    env = SUITE.make(0)
    env.reset(SUITE.goals(0)[0])
    with pytest.raises(WorkerError, match="toy-reach: a non-finite action at step 1"):
        env.step(np.array([0, np.nan], np.float32))


def test_picture() -> None:
    env = SUITE.make(0, render=True)
    env.reset(np.array([0.5, 0.5, -0.5, 0.5]))
    picture = env.render()
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert picture[32, 96].argmax() == 1  # the green goal, top right
    assert picture[32, 32].argmax() == 0  # the orange puck, top left
    with pytest.raises(WorkerError, match="render=True"):
        SUITE.make(0).render()


def test_suite_travels() -> None:
    assert pickle.loads(pickle.dumps(SUITE)).spec == SUITE.spec
    assert len(pickle.dumps(SUITE)) < 1000


def test_wrong_words() -> None:
    with pytest.raises(ConfigError, match="toy-push.*did you mean toy-"):
        Toy(["toy-push"])
    with pytest.raises(ConfigError, match="only one reward"):
        Toy(TOY_TASKS, reward="v1")
