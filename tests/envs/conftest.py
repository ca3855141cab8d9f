"""Fixtures with one of Meta-World's own benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def global_stream() -> list[int]:
    """Return the state of numpy's global generator."""
    state: Any = np.random.get_state()
    return [*state[1].tolist(), state[2]]


@pytest.fixture(scope="session")
def mt10() -> Any:
    """Return Meta-World's own MT10, with the same seed as ours."""
    from metaworld import MT10

    return MT10(seed=0)  # type: ignore[no-untyped-call]
