"""Statistics against other implementations, and on data with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softmod.report.intervals import (
    by_seed,
    improvement,
    interval,
    iqm,
    mean,
    resampled,
    steps_to_reach,
)

scores = arrays(
    np.float64, st.tuples(st.integers(2, 7), st.integers(1, 6)), elements=st.floats(0, 1)
)


@settings(max_examples=60, deadline=None)
@given(scores)
def test_iqm_is_the_trimmed_mean_of_scipy(values: np.ndarray):
    assert iqm(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25, axis=None), abs=1e-12)
    assert mean(values) == pytest.approx(np.average(values), abs=1e-12)


def test_iqm_of_known_numbers():
    assert iqm(np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [100.0]])) == 3.5
    assert iqm(np.array([[0.0, 10.0], [4.0, 6.0]])) == 5.0  # all values together, not per task
    assert (
        iqm(by_seed(np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))) == 0.5
    )  # three seeds: nothing is cut


def test_reductions_take_many_resamples_at_once():
    values = np.random.default_rng(0).random((9, 5, 3))
    np.testing.assert_allclose(iqm(values), [iqm(one) for one in values])


def test_resampling_is_within_tasks():
    values = np.arange(12.0).reshape(4, 3)
    drawn = resampled(values, np.random.default_rng(0), 500)
    assert drawn.shape == (500, 4, 3)
    for task in range(3):
        assert set(np.unique(drawn[:, :, task])) == set(values[:, task])
    rows = drawn // 3
    assert (rows[:, :, 0] != rows[:, :, 1]).any()  # each task draws its own seeds


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Compare with SciPy's percentile bootstrap of the mean, on ten seeds."""
    values = np.random.default_rng(1).normal(0.6, 0.1, (10, 1))
    ours = interval(mean, values, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values[:, 0],),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_the_stratified_interval_is_that_of_a_loop():
    """Compare with a plain loop over resamples, tasks and seeds."""
    values = np.random.default_rng(3).random((6, 4))
    rng, drawn = np.random.default_rng(4), []
    for _ in range(4_000):
        sample = [[values[rng.integers(6), task] for task in range(4)] for _ in range(6)]
        drawn.append(scipy.stats.trim_mean(np.array(sample), 0.25, axis=None))
    ours = interval(iqm, values, resamples=8_000)
    assert (ours.low, ours.high) == pytest.approx(
        tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.02
    )


def test_an_interval_has_its_nominal_coverage():
    """Check that the 95 % interval covers the mean in about 95 % of 200 random experiments."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = interval(mean, rng.normal(0.5, 0.2, (20, 1)), resamples=400)
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_equal_seeds_give_an_interval_of_width_zero():
    found = interval(iqm, np.full((3, 2), 0.7))
    assert found == pytest.approx((0.7, 0.7, 0.7))


def test_improvement_is_the_mann_whitney_statistic():
    ours, theirs = np.random.default_rng(6).random((2, 5, 1)).round(1)
    u = scipy.stats.mannwhitneyu(ours[:, 0], theirs[:, 0]).statistic
    assert improvement(ours, theirs).value == pytest.approx(u / 25)
    assert improvement(ours, theirs).value + improvement(theirs, ours).value == pytest.approx(1.0)


def test_a_single_seed_on_either_side_leaves_no_interval():
    one, three = np.array([[0.9]]), np.array([[0.1], [0.2], [0.3]])
    for ours, theirs, value in ((one, three, 1.0), (three, one, 0.0), (one, one, 0.5)):
        found = improvement(ours, theirs)
        assert found.value == value
        assert np.isnan([found.low, found.high]).all()


def test_improvement_of_known_numbers():
    better = improvement(
        np.array([[0.9, 0.2], [1.0, 0.3]]), np.array([[0.1, 0.2], [0.2, 0.3], [0.3, 0.4]])
    )
    assert better.value == pytest.approx((1.0 + (0.5 + 1.0 + 0.5) / 6) / 2)
    assert better.low <= better.value <= better.high
    assert improvement(np.ones((3, 2)), np.zeros((3, 2))) == (1.0, 1.0, 1.0)


def test_steps_to_reach_a_level():
    steps, curve = np.array([0, 100, 200, 300]), np.array([0.0, 0.4, 0.8, 0.7])
    assert steps_to_reach(steps, curve, 0.6) == 150.0
    assert steps_to_reach(steps, curve, 0.0) == 0.0
    assert math.isnan(steps_to_reach(steps, curve, 0.9))
    assert steps_to_reach(np.array([50]), np.array([1.0]), 0.9) == 50.0
