"""Statistics for few seeds: interquartile means, bootstrap intervals, probability of improvement.

They follow Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*
(NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmod.spec import iqm as iqm

Scores = NDArray[np.float64]  # [seed, task], or [seed] of task means
Statistic = Callable[[Scores], Scores]  # maps [..., seed, task] to [...]

RESAMPLES = 2_000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval, which are NaN for a single seed."""

    value: float
    low: float
    high: float


def mean(scores: Scores) -> Scores:
    """Return the mean over the last two axes: `[..., seed, task]` to `[...]`."""
    average: Scores = scores.mean((-2, -1))
    return average


def by_seed(scores: Scores) -> Scores:
    """Average each seed over tasks: `[seed, task]` to `[seed, 1]`."""
    return np.asarray(scores, np.float64).mean(-1, keepdims=True)


def interval(
    statistic: Statistic, scores: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Compute a statistic of `[seed, task]` with its 95 % stratified bootstrap interval.

    The tasks are the strata: each task's seeds are resampled with replacement, independently of
    the other tasks. The bounds are percentiles; they are NaN for a single seed.

    Args:
        statistic: Function of `[..., seed, task]`.
        scores: Success rates `[seed, task]`.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples.
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return Interval(float(statistic(scores)), math.nan, math.nan)
    drawn = statistic(resampled(scores, np.random.default_rng(seed), resamples))
    return Interval(float(statistic(scores)), *_bounds(drawn))


def resampled(scores: Scores, rng: np.random.Generator, resamples: int) -> Scores:
    """Resample each task's seeds with replacement: `[seed, task]` to `[resample, seed, task]`."""
    seeds, tasks = scores.shape
    rows = rng.integers(0, seeds, (resamples, seeds, tasks))
    return scores[rows, np.arange(tasks)]


def improvement(
    ours: Scores, theirs: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Compute the probability that a run of ours beats one of theirs on a task, mean over tasks.

    A tie counts half. The bounds are NaN if either side has a single seed.

    Args:
        ours: Success rates `[seed, task]`.
        theirs: Success rates `[seed, task]` on the same tasks; the number of seeds may differ.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap samples.
    """
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    if 1 in (len(ours), len(theirs)):
        return Interval(float(_better(ours, theirs)), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn = _better(resampled(ours, rng, resamples), resampled(theirs, rng, resamples))
    return Interval(float(_better(ours, theirs)), *_bounds(drawn))


def _better(ours: Scores, theirs: Scores) -> Scores:
    """Compare all pairs of seeds `[..., seed, task]`; a tie counts half."""
    a = ours[..., :, None, :]
    b = theirs[..., None, :, :]
    fraction: Scores = ((a > b) + 0.5 * (a == b)).mean((-3, -2, -1))
    return fraction


def _bounds(drawn: Scores) -> tuple[float, float]:
    """Return the percentiles that bound the interval."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def steps_to_reach(steps: NDArray[np.int64], success: Scores, level: float) -> float:
    """Return the first env step at which a curve reaches `level`, or NaN if it never does.

    The curve is interpolated linearly between evaluations.
    """
    for index, (step, value) in enumerate(zip(steps, success, strict=True)):
        if value >= level:
            if index == 0 or success[index - 1] >= value:
                return float(step)
            before = float(steps[index - 1])
            rise = float(value - success[index - 1])
            return before + (float(step) - before) * float(level - success[index - 1]) / rise
    return float("nan")
