"""Random streams with addresses: the run's seed, a purpose, and an index such as the update number.

A stream does not depend on the process that draws or on earlier draws. Resuming a run therefore
needs counters, not generator states.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from softmod.spec import Floats


class Purpose(IntEnum):
    """The purpose of a stream; comments give the index that follows it in the address.

    Values are part of a run's identity: append, never renumber.
    """

    NETWORKS = 0
    GOAL = 1  # task, copy, episode
    EXPLORATION = 2  # task, copy, episode
    BATCH = 3  # update
    UPDATE = 4  # update
    INSIDE = 5  # update; randomness inside networks, and the task order of gradient surgery
    COUNTER = 6  # the key of `softmod.counter`, for all draws of updates on the device


def sequence(seed: int, purpose: Purpose, *address: int) -> np.random.SeedSequence:
    """Return the seed sequence at an address."""
    return np.random.SeedSequence((seed, int(purpose), *address))


def generator(seed: int, purpose: Purpose, *address: int) -> np.random.Generator:
    """Return the numpy generator at an address."""
    return np.random.default_rng(sequence(seed, purpose, *address))


def counter_key(seed: int) -> tuple[int, int]:
    """Return the key of a run's counter-based generator: two 32-bit words."""
    first, second = sequence(seed, Purpose.COUNTER).generate_state(2).tolist()
    return first, second


def pink(white: Floats) -> Floats:
    """Turn white noise `[step, ...]` into pink noise: standard normal, with power 1/f over steps.

    Successive steps are correlated, so each episode explores in a direction of its own (Eberhard et
    al. 2023).
    """
    steps = len(white)
    if steps < 3:  # no frequency between 0 and the highest one
        return white
    frequencies = np.fft.rfftfreq(steps)
    frequencies[0] = frequencies[1]
    amplitude = frequencies**-0.5
    # Each frequency also stands for its negative, except 0 and, if `steps` is even, 1/2.
    multiplicity = np.full(len(frequencies), 2.0)
    multiplicity[0] = 1.0
    multiplicity[-1] = 2.0 if steps % 2 else 1.0
    amplitude /= np.sqrt((multiplicity * amplitude**2).sum() / steps)
    shape = (-1,) + (1,) * (white.ndim - 1)
    spectrum = np.fft.rfft(white, axis=0) * amplitude.reshape(shape)
    return np.fft.irfft(spectrum, steps, axis=0).astype(white.dtype)


def torch_generator(
    device: torch.device | str, seed: int, purpose: Purpose, *address: int
) -> torch.Generator:
    """Return the torch generator at an address, on a device."""
    state = sequence(seed, purpose, *address).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
