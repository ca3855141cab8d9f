"""Whole runs whose updates draw on the device: on a CPU, chunks are made one update at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softmod import replay_fault, train
from softmod.agent.chunks import Chunks
from softmod.agent.mtsac import MTSAC
from softmod.config.compose import compose, typed
from softmod.errors import ConfigError, NumericalError
from softmod.experiment import checks, resources
from softmod.experiment.resume import check_draws
from softmod.networks.mlp import MLP
from softmod.system import signals
from tests.command.test_signals import results, send_at
from tests.command.test_train import here, only, run, state

__all__ = ["here"]

LONGER = ["run.update_ratio=1.0", "run.steps_per_task=100"]  # ten updates in a round


def made(folder: Path, line: str) -> Path:
    """Train in a folder; return the run's folder."""
    assert run(*LONGER, f"run.folder={folder}", f"fabric.updates_per_graph={line}") == 0
    (made,) = folder.glob("*/seed_0")
    return made


def same(ours: Path, theirs: Path) -> bool:
    mine, other = state(ours), state(theirs)
    return mine.keys() == other.keys() and all(
        torch.equal(mine[name], other[name]) for name in mine
    )


def test_the_number_of_updates_per_graph_changes_nothing(here):
    ten, four, host = (made(here / line, line) for line in ("10", "4", "0"))
    assert results(ten) == results(four)
    assert same(ten, four)
    assert not same(ten, host)
    assert same(host, made(here / "null", "null"))  # on a CPU


@pytest.mark.bar(2)
def test_a_run_stopped_within_a_round_goes_on_to_the_same_end(here, monkeypatch):
    whole = made(here / "whole", "10")
    line = [*LONGER, "run.folder=halves"]
    with monkeypatch.context() as patch:
        send_at(patch, Chunks, "learn", 10)
        assert run(*line, "fabric.updates_per_graph=4") == signals.STOPPED
    assert run(*line, "fabric.updates_per_graph=null") == 0  # as before
    (halves,) = here.glob("halves/*/seed_0")
    assert results(halves) == results(whole)
    assert same(halves, whole)


@pytest.mark.parametrize(("before", "after"), [("4", "0"), ("0", "4")])
def test_a_run_draws_as_it_began(here, capsys, monkeypatch, before: str, after: str):
    owner, name = (Chunks, "learn") if before == "4" else (MTSAC, "training_step")
    with monkeypatch.context() as patch:
        send_at(patch, owner, name, 10)
        assert run(*LONGER, f"fabric.updates_per_graph={before}") == signals.STOPPED
    files = sorted(path for path in only(here).rglob("*"))
    assert run(*LONGER, f"fabric.updates_per_graph={after}") == 2
    assert f"fabric.updates_per_graph={after}: " in capsys.readouterr().err
    assert sorted(path for path in only(here).rglob("*")) == files


@pytest.mark.bar(15)
def test_the_fault_of_an_update_in_a_chunk_is_repeated(here, capsys):
    line = ["env._target_=tests.faulty.Faulty", "env.name=nan-1", "model=hard_routing"]
    assert run(*line, "fabric.updates_per_graph=4") == NumericalError.exit_code
    (bundle,) = (only(here) / "faults").iterdir()
    assert replay_fault.main([str(bundle), "--allow", "tests"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not finite, as it was" in lines[0]
    assert any(line.startswith("batch, reward:") for line in lines)


def test_what_may_change_between_two_sessions():
    def check(wanted: str, before: int | None) -> None:
        cfg = typed(compose(["env=toy", f"fabric.updates_per_graph={wanted}"]))
        check_draws(cfg, Path("checkpoint"), {"updates_per_graph": before})

    for wanted, before in (("null", 4), ("null", 0), ("10", 4), ("0", 0), ("0", None)):
        check(wanted, before)
    for wanted, before, allowed in (("0", 4, "null or at least 1"), ("4", None, "null or 0")):
        with pytest.raises(ConfigError, match=f"must be {allowed}"):
            check(wanted, before)


def test_the_default(monkeypatch: pytest.MonkeyPatch):
    def chosen(*line: str, before: dict[str, Any] | None = None) -> int:
        return resources.updates_per_graph(typed(compose(["env=toy", *line])), before or {})

    assert chosen() == 0
    assert chosen(before={"seed": 0}) == 0
    assert chosen(before={"updates_per_graph": 10}) == 10
    assert chosen("fabric.updates_per_graph=4", before={"updates_per_graph": 10}) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("algorithm=mtsac") == 25
    assert chosen("algorithm.policy_delay=2") == 26
    assert chosen(before={"seed": 0}) == 0  # a run that began with draws on the host
    assert chosen("fabric=cpu") == 0
    assert chosen("fabric.compile=eager") == 0
    assert chosen("fabric.compile=auto", "optimizer.actor.fused=false") == 0
    assert chosen("algorithm._target_=tests.command.test_updates_per_graph.Own") == 0


class Own(MTSAC):
    """An algorithm with inputs of its own."""

    def prepare(self, batch):
        return super().prepare(batch)


class Drawing(MLP):
    """A network that draws with a generator only."""

    def draw(self, batch, generator):
        """No-op."""


def test_what_draws_on_the_host_is_refused(here, capsys):
    own = "tests.command.test_updates_per_graph"
    line = ["model=mt_sac", "fabric.updates_per_graph=4"]
    assert train.run(["env=toy", *line, f"algorithm._target_={own}.Own"]) == 2
    assert "Own overrides prepare; must be null or 0" in capsys.readouterr().err
    assert train.run(["env=toy", *line, f"critic._target_={own}.Drawing"]) == 2
    assert "Drawing overrides draw, but not draw_from" in capsys.readouterr().err
    assert train.run(["env=toy", *line, "algorithm.policy_delay=3"]) == 2
    assert "must be a multiple of algorithm.policy_delay=3" in capsys.readouterr().err
    assert not checks.obstacle(typed(compose(["env=toy", "model=hard_routing"])))
