"""Randomness has addresses: every stream is keyed by the run's seed, a purpose and where it is used.

Nothing depends on which process draws, or on what was drawn before; resuming needs counters, not generator states.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream is for. The values are part of a run's identity: append, never renumber."""

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


def torch_generator(device: torch.device | str, seed: int, purpose: Purpose, *address: int) -> torch.Generator:
    """The torch stream at an address, on a device."""
    state = sequence(seed, purpose, *address).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
