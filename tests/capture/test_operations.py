"""The number of operations in the recipe's updates, which determines their overhead."""

from __future__ import annotations

import pytest

from softmod.agent.replay import Replay, random_rollout
from softmod.capture.cpu_graph import CpuGraph
from softmod.capture.update_graph import Captured
from softmod.config.compose import compose, typed
from softmod.experiment.build import make_agent, networks
from softmod.experiment.resources import fused, make_fabric
from softmod.spec import EnvSpec

TASKS = tuple(f"task {number}" for number in range(10))
SPEC = EnvSpec(TASKS, 39, 4, 500)


def operations(*overrides: str) -> dict[str, int]:
    """Return the number of operations of each of the recipe's programs, on ten tasks."""
    cfg = typed(
        compose(
            [
                "env=mt10",
                "fabric=cpu",
                "fabric.compile=captured",
                "run.batch_per_task=4",
                *overrides,
            ]
        )
    )
    agent, _ = make_agent(cfg, SPEC, *networks(cfg, SPEC), make_fabric(cfg), fused(cfg))
    replay = Replay(SPEC, 64, agent.device)
    replay.extend(random_rollout(SPEC, replay.capacity))
    agent.learn(replay, 6)
    counts = {}
    for name, program in agent.programs.items():
        assert isinstance(program, Captured)
        assert isinstance(program._replay, CpuGraph)
        counts[name] = len(program._replay.names)
    return counts


def test_without_kernels():
    counts = operations("fabric.precision=32-true", "fabric.kernels=off")
    assert 0 < counts["whole"] <= 459
    assert 0 < counts["critics"] <= 224


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("precision", "whole", "critics"), [("32-true", 220, 98), ("bf16-mixed", 254, 115)]
)
def test_with_kernels(precision: str, whole: int, critics: int):
    counts = operations(f"fabric.precision={precision}")
    assert 0 < counts["whole"] <= whole
    assert 0 < counts["critics"] <= critics
