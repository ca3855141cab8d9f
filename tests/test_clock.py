"""Cadences and the number of updates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softmod.clock import Clock, Schedule
from softmod.spec import EnvSpec, Rollout

SPEC = EnvSpec(("a", "b"), 1, 1, 100)


def rollout(copies: int, steps: int) -> Rollout:
    shape = (2, copies, steps)
    return Rollout(
        np.zeros((*shape, 1), "f"), np.zeros((*shape, 1), "f"), np.zeros(shape, "f"),
        np.zeros((*shape, 1), "f"),
        np.zeros(shape, bool),
    )  # fmt: skip


@given(every=st.integers(1, 500), steps=st.integers(1, 60))
def test_a_cadence_is_met_once_for_every_multiple_that_is_passed(every, steps):
    clock, met = Clock(), 0
    for _ in range(20):
        clock.advance(rollout(1, steps))
        met += clock.passed(every)
    total = 40 * steps
    assert met == (total // every if every >= 2 * steps else 20)


@given(
    ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0]),
    warmup=st.integers(0, 300),
    steps=st.sampled_from([10, 25, 50]),
    copies=st.integers(1, 3),
)
def test_updates_add_up_to_the_ratio(ratio, warmup, steps, copies):
    schedule, done, env_steps = Schedule(SPEC, warmup, ratio, steps * copies), 0, 0
    for _ in range(40):
        updates = schedule.updates(env_steps)
        assert updates == 0 or env_steps // 2 >= max(warmup, 1)
        done += updates
        env_steps += 2 * steps * copies
    beyond = env_steps // 2 - max(warmup, 0)
    assert done <= int(beyond * ratio) + 1
    assert done >= int((beyond - 2 * steps * copies) * ratio) - 1


def test_time_is_counted_over_sessions():
    clock = Clock()
    clock.restore(
        {"env_steps": 40, "rounds": 2, "seconds": 100.0, "previous": 20, "success": [0.5]}
    )
    clock.start()
    clock.advance(rollout(1, 10))
    assert clock.env_steps == 60
    assert clock.seconds == pytest.approx(100.0, abs=1.0)
    assert clock.previous == 40


@pytest.mark.parametrize(
    ("rates", "stop_at", "solved"),
    [([0.9], 0.9, False), ([0.9, 0.95], 0.9, True), ([0.9, 0.8, 0.95], 0.9, False), ([0.2, 1.0,
                                                                                      1.0], 1.0,
                                                                                      True),
     ([1.0, 1.0], None, False), ([], 0.0, False)],
)  # fmt: skip
def test_two_evaluations_running_have_to_reach_the_rate(rates, stop_at, solved):
    clock, resumed = Clock(), Clock()
    for rate in rates:
        clock.evaluated(rate)
    resumed.restore(clock.facts())
    assert clock.solved(stop_at) == resumed.solved(stop_at) == solved
