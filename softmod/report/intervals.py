"""Statistics of few seeds: interquartile means, stratified bootstrap intervals, probabilities of
improvement.

As recommended by Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical
Precipice* (NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]  # [seed, task], or [seed] of task means
Statistic = Callable[[Scores], Scores]  # of [..., seed, task]; reduces the last two axes

RESAMPLES = 2_000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate, and the bounds of its confidence interval; NaN where a single seed tells nothing
    of its spread.
    """

    value: float
    low: float
    high: float


def iqm(scores: Scores) -> Scores:
    """The mean of the middle half of all values in the last two axes; at each end a quarter,
    rounded down, is cut.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle: Scores = flat[..., cut : flat.shape[-1] - cut].mean(-1)
    return middle


def mean(scores: Scores) -> Scores:
    average: Scores = scores.mean((-2, -1))
    return average


def by_seed(scores: Scores) -> Scores:
    """Each seed's mean over tasks, as a single column: `[seed, task]` to `[seed, 1]`."""
    return np.asarray(scores, np.float64).mean(-1, keepdims=True)


def interval(
    statistic: Statistic, scores: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """A statistic of `[seed, task]` with its stratified bootstrap percentile interval.

    Each task's seeds are drawn anew, with replacement and independently of the other tasks' (the
    strata).
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return Interval(float(statistic(scores)), math.nan, math.nan)
    drawn = statistic(resampled(scores, np.random.default_rng(seed), resamples))
    return Interval(float(statistic(scores)), *_bounds(drawn))


def resampled(scores: Scores, rng: np.random.Generator, resamples: int) -> Scores:
    """`[resample, seed, task]`: for each task, as many of its values as there are seeds, with
    replacement.
    """
    seeds, tasks = scores.shape
    rows = rng.integers(0, seeds, (resamples, seeds, tasks))
    return scores[rows, np.arange(tasks)]


def improvement(
    ours: Scores, theirs: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The probability that a run of ours beats one of theirs on a task, a mean over tasks; a tie
    counts half.

    `ours` and `theirs` are `[seed, task]` with the same tasks; numbers of seeds may differ. A
    single seed on either side leaves no interval.
    """
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    if 1 in (len(ours), len(theirs)):
        return Interval(float(_better(ours, theirs)), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn = _better(resampled(ours, rng, resamples), resampled(theirs, rng, resamples))
    return Interval(float(_better(ours, theirs)), *_bounds(drawn))


def _better(ours: Scores, theirs: Scores) -> Scores:
    a = ours[..., :, None, :]
    b = theirs[..., None, :, :]
    share: Scores = ((a > b) + 0.5 * (a == b)).mean((-3, -2, -1))
    return share


def _bounds(drawn: Scores) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def steps_to_reach(steps: NDArray[np.int64], success: Scores, level: float) -> float:
    """The first step at which a curve is at `level` or above; NaN where it never is.

    Between evaluations: linear.
    """
    for index, (step, value) in enumerate(zip(steps, success, strict=True)):
        if value >= level:
            if index == 0 or success[index - 1] >= value:
                return float(step)
            before = float(steps[index - 1])
            rise = float(value - success[index - 1])
            return before + (float(step) - before) * float(level - success[index - 1]) / rise
    return float("nan")
