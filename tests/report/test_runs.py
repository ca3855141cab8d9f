"""Grouping of runs by protocol and model."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmod.config.earlier import completed_keys
from softmod.errors import ConfigError
from softmod.report import figures
from softmod.report import runs as module
from softmod.report.page import machines_line, protocol_line, unequal_line
from softmod.report.report import only_tasks_differ
from softmod.report.runs import Run, comparisons, from_folders
from softmod.report.tables import task_sets

BASE: dict[str, Any] = {
    "seed": 0, "name": "toy-a", "model": "a", "env.tasks": ["x", "y"], "env.goals": "benchmark",
    "env.goal_seed": 0,
    "env.reward": "v2", "env.horizon": 50, "run.eval_goals": 10, "run.final_eval_goals": 50,
    "run.batch_per_task": 64,
    "actor._target_": "m.A", "critic._target_": "m.A", "actor.width": 8, "critic.width": 8,
    "algorithm.task_weights": "none", "run.steps_per_task": 1000, "workers.processes": 2,
}  # fmt: skip


def run(status: str = "FINISHED", success: tuple[float, float] = (1.0, 0.5), **changes: Any) -> Run:
    """Make a run with two evaluations; `__` in a name stands for a dot in its key."""
    config = BASE | {key.replace("__", "."): value for key, value in changes.items()}
    values = {
        "eval/success_rate/mean": {100: 0.1, 200: sum(success) / 2},
        "eval/success_rate/x": {100: 0.2, 200: success[0]},
        "eval/success_rate/y": {100: 0.0, 200: success[1]},
        "time/seconds": {100: 10.0, 200: 25.0},
    }
    return Run(f"run {config['model']} {config['seed']}", status, config, values)


def test_seeds_of_one_model_are_one_group():
    (comparison,) = comparisons(
        [run(), run(seed=1, workers__processes=0, name="b"), run(model="b", actor__width=9)]
    )
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("a", 2), ("b", 1)]
    np.testing.assert_array_equal(comparison.groups[0].scores(), [[1.0, 0.5], [1.0, 0.5]])


@pytest.mark.parametrize(
    "changes",
    [{"env__reward": "v1"}, {"env__horizon": 100}, {"env__goals": "fixed"},
     {"run__final_eval_goals": 10},
     {"run__eval_goals": 7}, {"env__tasks": ["x"]}, {"env__goal_seed": 1}],
    ids=str,
)  # fmt: skip
def test_other_protocols_are_not_mixed_in(changes: dict[str, Any]):
    found = comparisons([run(), run(seed=1), run(seed=2, **changes)])
    assert [[len(group.runs) for group in comparison.groups] for comparison in found] == [[2], [1]]


def test_seen_failing_a_protocol_that_does_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PROTOCOL", {"env.tasks": "tasks"})
    assert len(comparisons([run(), run(seed=1, env__reward="v1")])) == 1


def test_labels_have_the_settings_that_differ_within_a_model():
    weights = [run(algorithm__task_weights=word) for word in ("none", "paper")]
    both = run(actor__width=16, critic__width=16)
    one = run(actor__width=16, critic__width=8)
    (comparison,) = comparisons([*weights, both, one])
    assert [group.label for group in comparison.groups] == [
        "a width=16",
        "a width=16 critic.width=8",
        "a width=8",
        "a width=8 task_weights=paper",
    ]


def test_a_label_has_the_changes_of_its_group_only():
    changed = [
        run(),
        run(actor__width=9, critic__width=9),
        run(algorithm__clip_norm=0.0),
        run(run__batch_per_task=32),
    ]
    for one in changed[:2] + changed[3:]:
        one.config["algorithm.clip_norm"] = 1.0
    (comparison,) = comparisons(changed)
    assert [group.label for group in comparison.groups] == [
        "a",
        "a clip_norm=0.0",
        "a run.batch_per_task=32",
        "a width=9",
    ]


def test_networks_of_one_shape_are_told_apart_by_their_class():
    other = run(critic___target_="m.B")
    assert "critic._target_" in other.config
    (comparison,) = comparisons([run(), other, run(actor___target_="m.C", critic___target_="m.C")])
    assert [group.label for group in comparison.groups] == ["a actor=C", "a critic=A", "a critic=B"]


@pytest.mark.parametrize(
    "changes", [{"fabric__precision": "tf32"}, {"workers__copies": 2}], ids=str
)
def test_what_changes_results_makes_another_group(changes: dict[str, Any]):
    (comparison,) = comparisons([run(), run(seed=1, **changes)])
    assert [len(group.runs) for group in comparison.groups] == [1, 1]


@pytest.mark.parametrize(
    "changes", [{"fabric__accelerator": "cuda"}, {"run__save_every": 7}], ids=str
)
def test_what_does_not_is_the_same_group(changes: dict[str, Any]):
    (comparison,) = comparisons([run(), run(seed=1, **changes)])
    assert [len(group.runs) for group in comparison.groups] == [2]


def test_every_excluded_run_is_listed():
    """List runs of a protocol without finished runs, and runs killed before they logged any."""
    nameless = Run("dead", "FAILED", {}, {})
    (comparison,) = comparisons([run(), run(status="FAILED", seed=3, env__tasks=["z"]), nameless])
    assert comparison.left_out == [
        "dead: ended before its configuration was recorded",
        "run a 3: FAILED (another protocol: z)",
    ]


def test_runs_of_unlike_machines_are_noted():
    """Runs of one model may differ in their machines, but then their times are not comparable."""
    alike, other = (
        [run(), run(seed=1, workers__timeout=9, fabric__threads=1)],
        run(seed=2, fabric__accelerator="cuda"),
    )
    other.tags = {"machine.processor": "another"}
    (same,), (mixed,) = comparisons(alike), comparisons([*alike, other])
    assert machines_line(same) is None
    assert machines_line(mixed) == (
        "Times and rates are not comparable: the runs differ in"
        " fabric.accelerator (cuda, not recorded); machine.processor (another, not recorded)."
    )


def test_fixed_goals_are_one_however_many_are_asked_for():
    (fixed,) = comparisons(
        [run(env__goals="fixed"), run(env__goals="fixed", seed=1, run__eval_goals=1)]
    )
    (others,) = comparisons([run()])
    assert "during training: 1; in the final one: 1." in protocol_line(fixed)
    assert "during training: 10; in the final one: 50." in protocol_line(others)


def test_seeds_of_unequal_length_are_noted():
    longer = run(seed=1)
    longer.values = {name: values | {400: 0.5} for name, values in longer.values.items()}
    (comparison,) = comparisons([run(), longer])
    assert (
        unequal_line(comparison.groups[0])
        == "a: its seeds trained for 200 to 400 environment steps."
    )
    assert unequal_line(comparisons([run(), run(seed=1)])[0].groups[0]) is None


def test_a_task_is_followed_from_set_to_set(tmp_path: Path):
    found = comparisons(
        [run(), run(seed=1, success=(0.0, 0.5)), run(env__tasks=["x"], success=(0.75, 0.0))]
    )
    assert only_tasks_differ(found)
    table = task_sets(found)
    assert table.columns[2:] == ["x", "y"]
    assert table.rows == [["a", 1, 0.75, None], ["a", 2, 0.5, 0.5]]
    assert figures.task_sets(table, tmp_path / "sets.png").stat().st_size > 5000
    assert not only_tasks_differ(comparisons([run(), run(env__tasks=["x"], env__reward="v1")]))


def test_unfinished_runs_are_left_out_and_listed():
    (comparison,) = comparisons([run(), run("KILLED", seed=1), run()])
    assert len(comparison.groups[0].runs) == 1
    assert comparison.left_out == ["run a 1: KILLED", "run a 0: the same model and seed as run a 0"]
    with pytest.raises(ConfigError, match="no run has finished"):
        comparisons([run("FAILED")])


def test_curves_over_steps_and_over_time():
    assert run().curve() == [(100.0, 0.1), (200.0, 0.75)]
    assert run().curve_over_time() == [(10.0, 0.1), (25.0, 0.75)]
    assert run().curve("nothing") == []


def test_journals_are_found_below_a_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="no journal"):
        from_folders([str(tmp_path)])
    folder = tmp_path / "runs" / "toy-a-1" / "seed_0"
    folder.mkdir(parents=True)
    lines = [
        {"kind": "header", "time": 1, "schema": 1, "run_id": "r"},
        {"kind": "params", "time": 1, "values": BASE},
        {
            "kind": "metrics",
            "time": 2,
            "step": 200,
            "values": {"eval/success_rate/x": 1.0, "eval/success_rate/y": 0.0},
        },
        {"kind": "status", "time": 3, "status": "FINISHED"},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = from_folders([str(tmp_path)])
    assert found.seed == 0
    np.testing.assert_array_equal(found.success(), [1.0, 0.0])


def test_links_and_patterns_lead_to_journals_once(tmp_path: Path, monkeypatch):
    elsewhere = tmp_path / "elsewhere" / "seed_0"
    elsewhere.mkdir(parents=True)
    line = {"kind": "header", "time": 1, "schema": 1, "run_id": "r"}
    (elsewhere / "journal.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("runs/linked").symlink_to(elsewhere.parent)
    Path("runs/again").symlink_to(elsewhere)
    Path("runs/round").symlink_to(tmp_path / "runs")
    Path("runs/loop").symlink_to("loop")
    Path("runs/gone").symlink_to("nowhere")
    for pattern in ("runs", "runs/*", f"{tmp_path}/r*", "**runs", f"{tmp_path}/**/seed_0"):
        assert len(from_folders([pattern])) == 1, pattern
    with pytest.raises(ConfigError, match=r"runs=\*\*x: there is no journal"):
        from_folders(["**x"])


def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path, monkeypatch, caplog):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        line = {"kind": "header", "time": 1, "schema": 1, "run_id": "r"}
        (tmp_path / name / "journal.jsonl").write_text(json.dumps(line) + "\n")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("theirs"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [run.source for run in from_folders([str(tmp_path)])] == [str(tmp_path / "ours")]
    assert f"{tmp_path}/theirs cannot be read (Permission denied); it is left out" in caplog.text
    with pytest.raises(ConfigError, match=r"theirs cannot be read \(Permission denied\)"):
        from_folders([str(tmp_path / "theirs")])


def test_runs_of_earlier_versions_are_read_too(tmp_path: Path):
    """Read the key `method` of earlier versions as `model`, and add keys that they had not."""
    old = {"method" if key == "model" else key: value for key, value in BASE.items()}
    lines = [
        {"kind": "header", "time": 1, "schema": 1, "run_id": "r"},
        {"kind": "params", "time": 1, "values": old},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = from_folders([str(tmp_path)])
    assert found.config == completed_keys(BASE)
    assert found.config.items() >= (BASE | {"algorithm.own": {}, "callbacks": []}).items()
