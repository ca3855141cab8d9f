"""Meta-World's own evaluator, on its own vector environments, agrees with ours to the episode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import VectorEnv
from metaworld.evaluation import evaluation

import softmod
from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.episode import EvalEpisode
from softmod.envs.gymnasium import Agent, task_names, use_goals
from softmod.envs.metaworld import MetaWorld
from softmod.errors import ConfigError

TASKS = ("pick-place-v3", "reach-v3", "window-open-v3")  # not in MT10's order
HORIZON = 45  # so short that some episodes fail
EPISODES = 6


@pytest.fixture(scope="module")
def policy() -> TrainedPolicy:
    return softmod.load("mt10")


def made(*tasks: str, **options: Any) -> VectorEnv:
    return gym.make_vec(
        "Meta-World/custom-mt-envs",
        envs_list=list(tasks),
        vector_strategy="sync",
        max_episode_steps=HORIZON,
        use_one_hot=True,
        **options,
    )


@pytest.fixture(scope="module")
def envs() -> Iterator[VectorEnv]:
    vector = made(*TASKS, task_select="pseudorandom")
    yield vector
    vector.close()


def goals_seen(envs: VectorEnv) -> list[list[np.ndarray]]:
    """Return lists that fill with the goals of each environment, reset by reset."""
    seen: list[list[np.ndarray]] = [[] for _ in TASKS]

    def watched(env: Any, goals: list[np.ndarray]) -> None:
        reset = env.reset

        def watch(**options: Any) -> Any:
            goals.append(np.array(env._last_rand_vec))
            return reset(**options)

        env.reset = watch

    for env, goals in zip(envs.envs, seen, strict=True):  # type: ignore[attr-defined]
        watched(env.unwrapped, goals)
    return seen


def ours(policy: TrainedPolicy, suite: MetaWorld, task: str, goal: np.ndarray) -> EvalEpisode:
    env = suite.make(suite.spec.tasks.index(task))
    episode = EvalEpisode(env, goal, HORIZON)
    while not episode.over:
        episode.step(policy.act(episode.obs, task))
    env.close()
    return episode


def test_other_goals_are_noticed(policy: TrainedPolicy, envs: VectorEnv):
    """Negative control: returns differ on the environments' own goals."""
    suite = MetaWorld(TASKS, horizon=HORIZON)
    envs.call("toggle_sample_tasks_on_reset", True)  # type: ignore[attr-defined]
    returns = evaluation(Agent(policy, envs), envs, num_episodes=1)[3]
    first = ours(policy, suite, TASKS[0], suite.goals(0)[0])
    assert returns[TASKS[0]] != pytest.approx([first.episode_return], rel=1e-6)


def test_both_evaluators_agree_to_the_episode(policy: TrainedPolicy, envs: VectorEnv):
    suite = MetaWorld(TASKS, horizon=HORIZON)
    assert task_names(envs) == list(TASKS)
    use_goals(envs, suite)
    seen = goals_seen(envs)
    _, _, rates, returns = evaluation(Agent(policy, envs), envs, num_episodes=EPISODES)
    successes = []
    for index, task in enumerate(TASKS):
        goals = seen[index][:EPISODES]
        known = {goal.tobytes() for goal in suite.goals(index)}
        assert len({goal.tobytes() for goal in goals} & known) == EPISODES  # all of them differ
        episodes = [ours(policy, suite, task, goal) for goal in goals]
        assert returns[task] == pytest.approx([e.episode_return for e in episodes], rel=1e-6)
        successes += [episode.success for episode in episodes]
        assert rates[task] == np.mean(successes[-EPISODES:])
    assert 0 < sum(successes) < len(successes)


def test_what_does_not_fit_is_refused(policy: TrainedPolicy, envs: VectorEnv):
    random = made("reach-v3")
    with pytest.raises(ConfigError, match="pseudorandom"):
        use_goals(random, MetaWorld(TASKS))
    random.close()
    with pytest.raises(ConfigError, match="pick-place-v3: not in the task set"):
        use_goals(envs, MetaWorld(TASKS[1:]))
    with pytest.raises(ConfigError, match="pick-place-v3: the policy was trained on reach-v3"):
        Agent(softmod.load("quickstart"), envs)
