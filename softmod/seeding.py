"""Randomness has addresses: every stream is keyed by the run's seed, a purpose and where it is
used.

Nothing depends on which process draws, or on what was drawn before; resuming needs counters, not
generator states.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from softmod.spec import Floats


class Purpose(IntEnum):
    """Name what a stream is for. Values are part of a run's identity: append, never renumber."""

    NETWORKS = 0
    GOAL = 1  # task, copy, episode
    EXPLORATION = 2  # task, copy, episode
    BATCH = 3  # update
    UPDATE = 4  # update
    INSIDE = 5  # update; what is random in a network or in the order of tasks


def sequence(seed: int, purpose: Purpose, *address: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, int(purpose), *address))


def generator(seed: int, purpose: Purpose, *address: int) -> np.random.Generator:
    """The numpy stream at an address."""
    return np.random.default_rng(sequence(seed, purpose, *address))


def pink(white: Floats) -> Floats:
    """Turn white noise `[step, ...]` into noise of power 1/f along the steps, standard normal at
    each of them.

    Neighbouring steps then differ little and an episode explores in a direction of its own
    (Eberhard et al. 2023).
    """
    steps = len(white)
    if steps < 3:  # too short for a frequency beside the mean's
        return white
    frequencies = np.fft.rfftfreq(steps)
    frequencies[0] = frequencies[1]
    amplitude = frequencies**-0.5
    twice = np.full(len(frequencies), 2.0)  # each stands for its negative too, but for 0 and a half
    twice[0] = 1.0
    twice[-1] = 2.0 if steps % 2 else 1.0
    amplitude /= np.sqrt((twice * amplitude**2).sum() / steps)
    shape = (-1,) + (1,) * (white.ndim - 1)
    spectrum = np.fft.rfft(white, axis=0) * amplitude.reshape(shape)
    return np.fft.irfft(spectrum, steps, axis=0).astype(white.dtype)


def torch_generator(
    device: torch.device | str, seed: int, purpose: Purpose, *address: int
) -> torch.Generator:
    """The torch stream at an address, on a device."""
    state = sequence(seed, purpose, *address).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
