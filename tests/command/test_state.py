"""Hashes of a run's state: equal for equal runs, and different for the component that differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softmod import state
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.load import find
from tests.command.test_train import here, only, run

__all__ = ["here"]


def hashes(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, str]:
    """Return the hashes that the command prints."""
    capsys.readouterr()
    assert state.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return dict(line.split() for line in lines)


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """Return the components whose hashes differ."""
    return {name for name in one if one[name] != other[name]}


def rewrite(folder: Path, name: str, change) -> None:
    """Change a file of a checkpoint and its digest in the manifest."""
    path = folder / name
    change(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = checkpoint.digest(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def nudge(key: str):
    """Return a function that changes one number of an array in a file."""

    def change(path: Path) -> None:
        arrays = load_file(path)
        arrays[key].view(-1)[0] += 1e-7
        save_file(arrays, path)

    return change


@pytest.mark.bar(1)
@pytest.mark.bar(2)
def test_equal_runs_have_equal_hashes_however_they_came_there(here, capsys):
    assert run("run.folder=whole") == 0
    assert run("run.folder=halves", "run.steps_per_task=90") == 0
    assert run("run.folder=halves") == 0
    assert run("run.folder=other", "seed=1") == 0
    whole, halves, other = (
        hashes(capsys, next(here.glob(f"{name}/*/seed_*"))) for name in ("whole", "halves", "other")
    )
    # the shorter run's own last evaluation is in its journal, and may have been its best
    assert differing(whole, halves) <= {"metrics", "counters", "state"}
    assert whole["replay"] == halves["replay"]
    empty = {"begun", "average", "statistics"}  # in a toy run
    assert differing(whole, other) == set(whole) - empty


@pytest.mark.control(1)
def test_the_component_that_differs_is_named(here, capsys):
    assert run() == 0
    folder, _ = find(only(here))
    before = hashes(capsys, folder)
    for name, key, component in [
        ("agent", "actor.network.first.weight", "networks"),
        ("agent", "target_critic.first.weight", "targets"),
        ("agent", "log_temperature", "temperatures"),
        ("optimizers", "0.0.exp_avg", "optimizers"),
        ("episodes", "actions", "episodes"),
    ]:
        content = (folder / f"{name}.safetensors").read_bytes()
        rewrite(folder, f"{name}.safetensors", nudge(key))
        assert differing(before, hashes(capsys, folder)) == {component, "state"}
        rewrite(
            folder, f"{name}.safetensors", lambda path, content=content: path.write_bytes(content)
        )
    facts = json.loads((folder / "facts.json").read_text())
    facts["counters"]["updates"] += 1
    rewrite(folder, "facts.json", lambda path: path.write_text(json.dumps(facts)))
    assert differing(before, hashes(capsys, folder)) == {"counters", "state"}


def test_what_has_no_state(here, capsys):
    assert state.main([str(here / "nothing")]) == 3
    assert "neither a checkpoint nor a run's folder" in capsys.readouterr().err
    assert run() == 0
    capsys.readouterr()
    assert state.main([str(only(here) / "checkpoints" / "best")]) == 3
    assert "holds weights only" in capsys.readouterr().err
