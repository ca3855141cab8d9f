"""The number of operations that an update launches on a GPU, which determines its time there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import Launches, compiled, launches, on_gpu
from softmod.agent.chunks import Chunks
from softmod.agent.steps import FlatSteps
from softmod.kernels import formulas
from softmod.spec import EnvSpec

SPEC = EnvSpec(tuple(f"task {number}" for number in range(10)), 39, 4, 500, 200, 18)
CHUNK = 10
# Operations of the whole update and of the critics' only: steps of PyTorch, and steps in Triton.
EXACT = {"mt10": ((467, 224), (416, 203)), "paper_mt10": ((478, 0), (417, 0))}
MOST_OUTSIDE = {"mt10": 22, "paper_mt10": 18}  # per update of a chunk
COMPILED = 257, 120  # kernels of the recipe


def by_program(counted: Launches) -> tuple[float, float]:
    """Return the operations per call of the whole update and of the critics' only."""
    whole, critics = (
        counted.within[name].total() / max(counted.calls[name], 1) for name in ("whole", "critics")
    )
    return whole, critics


def per_update(experiment: str, per_graph: int) -> float:
    cfg = on_gpu(f"experiment={experiment}")
    return launches(cfg, SPEC, CHUNK, per_graph).counts.total() / CHUNK


@pytest.mark.parametrize("experiment", EXACT)
@pytest.mark.parametrize("flat", [False, True])
def test_operations_of_each_kind_of_update(experiment: str, flat: bool):
    """Meta tensors have no values, so an update that waits for one fails."""
    counted = launches(on_gpu(f"experiment={experiment}"), SPEC, 2, 0, flat)
    assert by_program(counted) == EXACT[experiment][flat]


@pytest.mark.parametrize("experiment", EXACT)
def test_a_chunk_launches_no_more_operations_than_before(experiment: str):
    counted = launches(on_gpu(f"experiment={experiment}"), SPEC, CHUNK, CHUNK)
    of_each = zip(by_program(counted), EXACT[experiment][True], strict=True)
    assert all(mine <= most for mine, most in of_each)
    assert 5 < counted.outside() <= MOST_OUTSIDE[experiment]


def test_steps_on_a_gpu_are_ten_triton_kernels():
    counted = launches(on_gpu("experiment=mt10"), SPEC, 2, 0)
    kernels = ("_sums", "_norms", "_all_finite", "_adam", "_settle")
    assert [counted.within["whole"][name] for name in kernels] == [2, 2, 2, 3, 1]
    assert [counted.within["critics"][name] for name in kernels] == [1, 1, 1, 1, 0]


def test_a_compiled_update_launches_no_more_kernels_than_before():
    cfg = on_gpu("experiment=mt10")
    cfg.fabric.compile = "compiled"
    counted = compiled(cfg, SPEC, ["whole", "critics"])
    for kernels, most, products in zip(counted.values(), COMPILED, (79, 37), strict=True):
        assert kernels["bmm"] + kernels["baddbmm"] == products
        assert products < kernels.total() <= most


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
    with pytest.raises(AssertionError, match="outside"):
        test_a_chunk_launches_no_more_operations_than_before("mt10")


def test_seen_failing_a_step_that_copies(monkeypatch: pytest.MonkeyPatch):
    step = FlatSteps._flat_step

    def slower(self, own, finite, **options):
        step(self, own, finite.clone(), **options)

    monkeypatch.setattr(FlatSteps, "_flat_step", slower)
    with pytest.raises(AssertionError, match="At index 0"):
        test_operations_of_each_kind_of_update("mt10", flat=True)


def test_seen_failing_a_compiled_update_with_operations_more(monkeypatch: pytest.MonkeyPatch):
    """A sort is not fused with its neighbours."""
    norms = formulas.norms
    monkeypatch.setattr(formulas, "norms", lambda *given: norms(*given).sort().values)
    with pytest.raises(AssertionError, match="total"):
        test_a_compiled_update_launches_no_more_kernels_than_before()


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
