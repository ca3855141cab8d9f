"""The number of operations that an update launches on a GPU, which determines its time there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import Launches, launches, on_gpu
from softmod.agent.chunks import Chunks
from softmod.spec import EnvSpec

SPEC = EnvSpec(tuple(f"task {number}" for number in range(10)), 39, 4, 500, 200, 18)
CHUNK = 10
# operations per update: drawn on the host, and in chunks
MOST = {"mt10": (425, 365), "paper_mt10": (519, 492)}


def per_update(experiment: str, per_graph: int) -> float:
    return launches(on_gpu(f"experiment={experiment}"), SPEC, CHUNK, per_graph).total() / CHUNK


@pytest.mark.parametrize("experiment", MOST)
def test_an_update_launches_no_more_operations_than_before(experiment: str):
    """Meta tensors have no values, so an update that waits for one fails."""
    most = MOST[experiment]
    assert 20 < per_update(experiment, 0) <= most[0]
    assert 20 < per_update(experiment, CHUNK) <= most[1]


def test_what_is_drawn_for_a_chunk_costs_little_per_update():
    halves, whole = (per_update("mt10", size) for size in (4, CHUNK))
    assert whole < halves < whole + 40


def test_seen_failing_an_operation_more(monkeypatch: pytest.MonkeyPatch):
    provide = Chunks._provide

    def slower(self, draws, at):
        for _ in range(15):
            self.inputs[0].add_(0.0)
        return provide(self, draws, at)

    monkeypatch.setattr(Chunks, "_provide", slower)
    with pytest.raises(AssertionError):
        test_an_update_launches_no_more_operations_than_before("mt10")


def test_seen_failing_an_update_that_waits(monkeypatch: pytest.MonkeyPatch):
    provide = Chunks._provide

    def waiting(self, draws, at):
        float(self.skipped)
        return provide(self, draws, at)

    monkeypatch.setattr(Chunks, "_provide", waiting)
    with pytest.raises(RuntimeError):
        per_update("mt10", CHUNK)


def test_views_and_allocations_are_free():
    x = torch.ones(3, 4, device="meta")
    with Launches() as counted:
        y = torch.empty_like(x)
        y.view(12)[2:].unsqueeze(0).expand(5, 10)
        torch.add(x.t(), 1.0)
        torch._foreach_mul_([x, y], 2.0)
        torch.ones(3) + 1.0  # on the CPU
    assert counted.counts == {"add": 1, "_foreach_mul_": 1}
