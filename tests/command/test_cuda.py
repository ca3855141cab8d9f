"""Whole runs on a GPU: every precision, and a run that is stopped and resumed."""

from __future__ import annotations

import math

import pytest

from softmod import evaluate, train
from softmod.agent.chunks import Chunks
from softmod.agent.mtsac import MTSAC
from softmod.checkpoint.load import find
from softmod.experiment import session
from softmod.state import state_hash
from softmod.system import signals
from tests.command.test_signals import send_at
from tests.command.test_train import SMALL, here, metrics, only

__all__ = ["here"]

pytestmark = pytest.mark.cuda


def run(*more: str) -> int:
    """Train on the GPU; return the exit code."""
    return train.run([*SMALL, "fabric=cuda", *more])


@pytest.mark.parametrize("compile_", ["captured", "eager"])
@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16", "bf16-mixed"])
def test_a_run_in_every_precision(here, precision: str, compile_: str):
    assert run(f"fabric.precision={precision}", f"fabric.compile={compile_}") == 0
    values = metrics(only(here))
    assert all(math.isfinite(value) for value in values.values())
    assert max(step for _, step in values) == 600
    assert evaluate.run([f"checkpoint={only(here)}", "goals=2"]) == 0


@pytest.mark.bar(2)
@pytest.mark.parametrize("deterministic", ["true", "false"])
@pytest.mark.parametrize("per_graph", ["0", "null"])
def test_a_stopped_run_goes_on_to_the_same_state(
    here, deterministic: str, per_graph: str, monkeypatch: pytest.MonkeyPatch
):
    options = [f"fabric.deterministic={deterministic}", f"fabric.updates_per_graph={per_graph}"]
    owner, name = (MTSAC, "training_step") if per_graph == "0" else (Chunks, "learn")
    assert run("run.folder=whole", *options) == 0
    with monkeypatch.context() as patch:
        send_at(patch, owner, name, 8)
        assert run("run.folder=halves", *options) == signals.STOPPED
    assert run("run.folder=halves", *options) == 0
    whole, halves = (
        state_hash(find(next(here.glob(f"{name}/*/seed_0")))[0]) for name in ("whole", "halves")
    )
    assert halves == whole


def test_a_run_stopped_between_two_graphs_goes_on_to_the_same_state(
    here, monkeypatch: pytest.MonkeyPatch
):
    options = ["run.update_ratio=1.0", "fabric.updates_per_graph=4"]  # ten updates in a round
    assert run("run.folder=whole", *options) == 0
    with monkeypatch.context() as patch:
        send_at(patch, Chunks, "learn", 8)
        assert run("run.folder=halves", *options) == signals.STOPPED
    assert run("run.folder=halves", *options) == 0
    whole, halves = (
        state_hash(find(next(here.glob(f"{name}/*/seed_0")))[0]) for name in ("whole", "halves")
    )
    assert halves == whole


def test_seeds_beside_one_another_draw_on_the_device(here):
    assert run("seeds=[0,1]") == 0
    for seed in (0, 1):
        assert all(math.isfinite(value) for value in metrics(only(here, seed)).values())


def test_on_a_cpu_it_is_another_run_that_starts_alike(here, monkeypatch: pytest.MonkeyPatch):
    """Check that networks have the same initial values, and so the same first round, anywhere."""
    seen = []
    original = session.Replay.extend
    monkeypatch.setattr(
        session.Replay, "extend", lambda self, r: (seen.append(r.obs.copy()), original(self, r))[1]
    )
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        seen.clear()
        assert (
            train.run([*SMALL, f"fabric={device}", f"run.folder={name}", "run.steps_per_task=40"])
            == 0
        )
        if name == "gpu":
            first = list(seen)
    assert all((a == b).all() for a, b in zip(first, seen, strict=True))
