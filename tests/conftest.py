"""Shapes are checked at run time in networks, agent and replay; goals are cached once for the whole
session.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook(["softmod.networks", "softmod.agent"], "beartype.beartype"):
    gc.disable()  # until the tests are collected: what imports create stays, and searching it
    #               again and again takes seconds
    import softmod.agent.group
    import softmod.agent.mtsac
    import softmod.agent.replay
    import softmod.networks.experts
    import softmod.networks.film
    import softmod.networks.gaussian
    import softmod.networks.hard_routing
    import softmod.networks.mixed_experts
    import softmod.networks.multi_head
    import softmod.networks.paco
    import softmod.networks.residual
    import softmod.networks.single_task  # noqa: F401


from softmod.system.signals import STOPS
from tests.reliability.table import (
    pytest_addoption,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

__all__ = ["pytest_addoption", "pytest_runtest_makereport", "pytest_terminal_summary"]


LONGEST = (  # minutes down to seconds on one core
    "test_processes.py",
    "test_workers.py",
    "test_train.py",
    "test_config.py",
    "test_machines.py",
    "test_uploader.py",
    "test_seeds.py",
    "test_library.py",
    "test_signals.py",
    "test_group.py",
    "test_launchers.py",
    "test_killed.py",
    "test_chunks.py",
    "test_search.py",
    "test_python.py",
    "test_results.py",
    "test_compiled.py",
)


def pytest_collection_finish() -> None:
    """Keep what was imported out of all later garbage collections, which took a second each."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: in parallel, a process takes whole files, and none should be
    left for the end.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goals are drawn once for all tests, and never taken from the user's own cache."""
    monkeypatch.setenv("SOFTMOD_CACHE", str(cache))


@pytest.fixture
def compiler(shared_cache: None) -> None:
    """Skip a test where the kernels do not compile; they go into the tests' own cache folder."""
    from softmod import kernels

    if not kernels.available():
        pytest.skip("no C compiler")


@pytest.fixture(autouse=True, scope="session")
def signals_are_delivered() -> None:
    """Undo what `nohup make test` ignores: a run leaves ignored signals ignored."""
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def threads() -> Iterator[None]:
    """Small products are fastest on one thread, and a test's figures do not depend on the cores at
    hand.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
