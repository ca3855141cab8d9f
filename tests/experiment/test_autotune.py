"""Choice of processes and threads from made-up costs with known answers; the cache of choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from softmod.experiment.autotune import (
    Chosen,
    Costs,
    Round,
    best,
    cached_choice,
    seconds,
    thread_counts,
)

LIGHT = Costs({1: 0.001, 2: 0.0009, 4: 0.0009}, step=0.001)  # more threads hardly help
HEAVY = Costs({1: 0.4, 2: 0.2, 4: 0.1}, step=0.001)
ROUND = Round(updates=50, env_steps=500, environments=10)


def test_thread_counts():
    assert thread_counts(1) == [1]
    assert thread_counts(2) == [1, 2]
    assert thread_counts(6) == [1, 2, 4, 6]


def test_stepping_gets_the_cores_where_updates_are_light():
    assert best(LIGHT, ROUND, cores=4) == Chosen(processes=4, threads=1)
    assert best(LIGHT, ROUND, cores=2) == Chosen(processes=2, threads=1)


def test_updates_get_the_cores_where_they_are_heavy():
    assert best(HEAVY, ROUND, cores=4).threads == 4
    assert best(HEAVY, ROUND, cores=2) == Chosen(processes=2, threads=2)


def test_two_threads_that_gain_little_are_worse_than_one_beside_a_worker():
    """Take the quickstart's costs on two AVX2 cores."""
    costs, wanted = (
        Costs({1: 0.018, 2: 0.0145, 4: 0.0145}, step=0.00055),
        Round(updates=12.5, env_steps=150, environments=3),
    )
    assert seconds(costs, wanted, Chosen(1, 2), cores=2) > seconds(
        costs, wanted, Chosen(1, 1), cores=2
    )
    assert best(costs, wanted, cores=4) == Chosen(processes=1, threads=2)


def test_two_threads_that_gain_much_take_turns_with_two_workers():
    """Reproduce MT10 on two AVX-512 cores: 2,480 env steps/s in turns, about 2,070 otherwise."""
    costs = Costs({1: 0.0089, 2: 0.0057}, step=0.00015)
    chosen = best(costs, Round(25, 500, environments=10), cores=2)
    assert chosen == Chosen(processes=2, threads=2)
    assert chosen.in_turns(cores=2)
    assert not chosen.in_turns(cores=4)
    assert not Chosen(processes=2, threads=1).in_turns(cores=2)
    assert not Chosen(processes=0, threads=2).in_turns(cores=2)


def test_what_is_given_stays():
    assert best(HEAVY, ROUND, threads=1, cores=2).threads == 1
    assert best(LIGHT, ROUND, processes=1, cores=4).processes == 1
    assert best(HEAVY, ROUND, processes=0, cores=2) == Chosen(0, 2)
    assert (
        best(LIGHT, Round(50, 50, environments=1), cores=4).processes == 1
    )  # one environment cannot be shared out


def test_a_learner_does_not_share_its_core_for_the_sake_of_faster_workers():
    """Reproduce MT10 on two cores: 2 processes beside the learner were slower than 1."""
    costs, wanted = (
        Costs({1: 0.0215, 2: 0.0215}, step=0.0006),
        Round(12.5, 250, environments=10, evaluated=60.0),
    )
    assert best(costs, wanted, cores=2) == Chosen(processes=1, threads=1)
    assert seconds(costs, wanted, Chosen(1, 1), cores=2) == pytest.approx(
        12.5 * 0.0215 + 60 * 0.0006
    )
    shared = 0.075 * 3 / 2 + (12.5 * 0.0215 - 0.075)
    assert seconds(costs, wanted, Chosen(2, 1), cores=2) == pytest.approx(shared + 30 * 0.0006)


def test_a_round_takes_its_longer_half_or_all_the_work():
    assert seconds(LIGHT, ROUND, Chosen(1, 1), cores=4) == pytest.approx(0.5)
    assert seconds(LIGHT, ROUND, Chosen(0, 1), cores=4) == pytest.approx(0.55)
    assert seconds(LIGHT, ROUND, Chosen(4, 1), cores=4) == pytest.approx((0.05 + 0.5) / 4)
    assert seconds(HEAVY, ROUND, Chosen(2, 2), cores=2) == pytest.approx(50 * 0.2 + 0.25)


def test_evaluations_get_the_cores_that_learning_leaves():
    """Use idle cores for evaluations: on a GPU, one process would suffice for collecting."""
    costs = Costs({1: 0.004}, step=0.0003)
    assert best(costs, Round(50, 500, environments=10), cores=16) == Chosen(1, 1)
    assert best(costs, Round(50, 500, environments=10, evaluated=250.0), cores=16) == Chosen(10, 1)
    often = Round(50, 500, 10, 250.0)
    assert seconds(costs, often, Chosen(0, 1), cores=16) == pytest.approx(0.2 + 0.15 + 0.075)
    assert seconds(costs, often, Chosen(2, 1), cores=16) == pytest.approx(0.2 + 0.0375)


def test_a_choice_is_measured_once_per_question(tmp_path: Path):
    asked = []

    def measure() -> Costs:
        asked.append(1)
        return HEAVY

    def choose(costs: Costs) -> Chosen:
        return best(costs, ROUND, cores=2)

    for question, times in (({"identity": "a"}, 1), ({"identity": "a"}, 1), ({"identity": "b"}, 2)):
        assert cached_choice(tmp_path / "cache", question, measure, choose) == Chosen(2, 2)
        assert len(asked) == times
    for path in (tmp_path / "cache").iterdir():
        path.write_text("{")
    assert cached_choice(tmp_path / "cache", {"identity": "a"}, measure, choose) == Chosen(2, 2)
    assert len(asked) == 3
