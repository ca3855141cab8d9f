"""Exploration noise: what pink noise is."""

from __future__ import annotations

import numpy as np
import pytest

from softmod.seeding import pink


def white(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("steps", [3, 20, 199, 200])
def test_pink_noise_is_standard_normal_at_each_step(steps):
    noise = pink(white(steps, 20_000))
    assert noise.shape == (steps, 20_000)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.mean(1), 0.0, atol=0.05)
    np.testing.assert_allclose(noise.std(1), 1.0, atol=0.05)
    kurtosis = (noise.astype(np.float64) ** 4).mean()
    assert kurtosis == pytest.approx(3.0, abs=0.1)


def test_its_power_falls_with_the_frequency():
    spectrum = np.square(np.abs(np.fft.rfft(pink(white(200, 5_000)), axis=0))).mean(1)[1:-1]
    frequencies = np.fft.rfftfreq(200)[1:-1]
    slope = np.polyfit(np.log(frequencies), np.log(spectrum), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_episode_too_short_for_it_keeps_white_noise(steps):
    np.testing.assert_array_equal(pink(white(steps, 4)), white(steps, 4))
