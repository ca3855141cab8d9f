"""One goal cache and one of Meta-World's own benchmarks for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def global_stream() -> list[int]:
    """The state of numpy's global generator."""
    state: Any = np.random.get_state()
    return [*state[1].tolist(), state[2]]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTMOD_CACHE", str(cache))


@pytest.fixture(scope="session")
def mt10() -> Any:
    """Meta-World's own MT10, with the same seed as ours."""
    from metaworld import MT10

    return MT10(seed=0)  # type: ignore[no-untyped-call]
