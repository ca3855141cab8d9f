"""Running statistics against numpy on all experience at once, and their effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod.agent.running import ReturnScale, RunningMoments, SuccessRates, largest_return
from softmod.networks.normalization import LEAST_STD, LIMIT, Normalizer
from softmod.spec import Episode


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rounds=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_moments_are_those_of_all_experience(seed, rounds):
    draws, moments, seen = np.random.default_rng(seed), RunningMoments(4), []
    for steps in rounds:
        obs = (1e3 + draws.standard_normal((3, 2, steps, 4)) * [1e-3, 1.0, 50.0, 0.0]).astype(
            np.float32
        )
        moments.add(obs)
        seen.append(obs.reshape(-1, 4))
    everything = np.concatenate(seen).astype(np.float64)
    np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, everything.var(0), rtol=1e-9, atol=1e-12)


def test_normalised_observations_have_mean_0_and_deviation_1_and_are_clipped():
    obs = (
        torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 7.0, 1e-6])
        + 3.0
    )
    normalizer = Normalizer(3)
    normalizer.set(obs.mean(0), obs.var(0, correction=0))
    normal = normalizer(obs)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal[:, :2].std(0), torch.ones(2), atol=1e-2, rtol=0)
    assert normal[:, 2].std() < 1e-6 / LEAST_STD * 1.5
    assert normalizer(torch.full((1, 3), 1e6)).tolist() == [[LIMIT] * 3]


def returns_by_hand(rewards, discount):
    tail = np.mean(rewards) / (1 - discount)
    steps = range(len(rewards))
    return [
        sum(discount ** (k - t) * rewards[k] for k in steps if k >= t)
        + discount ** (len(rewards) - t) * tail
        for t in steps
    ]


@settings(max_examples=30, deadline=None)
@given(rewards=st.lists(st.floats(-10, 10), min_size=1, max_size=30), discount=st.floats(0.5, 0.99))
def test_the_largest_return_is_that_of_the_sums(rewards, discount):
    expected = max(map(abs, returns_by_hand(rewards, discount)))
    assert largest_return(rewards, discount) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def episode(task: int, rewards: list[float]) -> Episode:
    return Episode(task, 0, 0, sum(rewards), False, tuple(rewards))


def test_a_task_and_its_tenfold_rewards_are_equal():
    """Without temperature: the entropy term does not scale with the rewards."""
    scale, draws = ReturnScale(2, 0.9, -2.0), np.random.default_rng(0)
    for _ in range(3):
        rewards = draws.uniform(0, 10, 20).tolist()
        scale.add([episode(0, rewards), episode(1, [10 * reward for reward in rewards])])
    reward = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    scaled = scale(reward, torch.zeros(2))
    torch.testing.assert_close(scaled[0], scaled[1])
    values = max(map(abs, returns_by_hand(rewards, 0.9))) / (reward[0] / scaled[0])
    assert values.max() <= 10.0 + 1e-4


def test_entropy_has_room_in_the_scale():
    scale = ReturnScale(1, 0.9, -2.0)
    scale.add([episode(0, [5.0] * 4)])  # 5 forever: a return of 50
    temperature = torch.tensor([0.3])
    assert scale(torch.ones(1, 1), temperature).item() == pytest.approx(
        10 / (50 + 0.3 * 2 / (2 * 0.1))
    )


def test_the_scale_grows_and_never_shrinks_and_waits_for_a_whole_episode():
    scale = ReturnScale(2, 0.9, -2.0)
    assert scale(torch.full((2, 1), 3.0), torch.ones(2)).tolist() == [[3.0], [3.0]]
    for size, expected in [(1.0, 10.0), (3.0, 30.0), (2.0, 30.0)]:
        scale.add([episode(1, [size] * 5)])
        assert scale.largest.tolist() == pytest.approx([0.0, expected])


def test_success_rates_are_running_means_of_each_task():
    rates, expected = SuccessRates(2), [0.0, 0.0]
    draws = np.random.default_rng(0)
    for _ in range(30):
        task, success = int(draws.integers(2)), bool(draws.random() < 0.7)
        rates.add([Episode(task, 0, 0, 0.0, success)])
        expected[task] += 0.1 * (success - expected[task])
    assert rates.rates.tolist() == pytest.approx(expected, rel=1e-5)
    rates.add([Episode(0, 0, 0, 0.0, True)] * 100)
    assert rates.rates[0] == pytest.approx(1.0, abs=1e-3)
    assert rates.rates[1].item() == pytest.approx(expected[1], rel=1e-5)
