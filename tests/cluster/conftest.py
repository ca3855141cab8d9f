"""The cluster that the tests share, and runs that nothing disturbed to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.cluster.runs import Folder
from tests.cluster.slurm import Slurm, missing

Undisturbed = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Start a cluster; skip the test where SLURM is not installed."""
    if needed := missing():
        pytest.skip(needed)
    # a short path: of a socket, it may have 107 characters
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Slurm(Path(folder)) as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return a function that trains without a cluster and returns the hashes of the run's state."""

    @cache
    def train(*overrides: str) -> dict[str, str]:
        folder = Folder(tmp_path_factory.mktemp("undisturbed"))
        process = folder.train(*overrides, "tracking=journal")
        assert process.wait(300) == 0, folder.printed()
        (hashes,) = folder.hashes().values()
        return hashes

    return train
