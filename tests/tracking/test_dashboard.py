"""What a person sees first in MLflow, on a real sqlite store: each place is filled."""

from __future__ import annotations

import getpass
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Dataset, Metric

from softmod.command import sweep_identity
from softmod.config.compose import compose, parse, typed
from softmod.experiment.publish import mlflow_metadata
from softmod.system.hardware import Usage
from softmod.tracking import dashboard, destination, names
from softmod.tracking import mlflow_store as store
from softmod.tracking.descriptions import OWN_BELOW, run_name, with_own_lines, without_seed
from softmod.tracking.journal import Journal
from softmod.tracking.sender import Sender
from softmod.tracking.sweeps import joint_status, joint_success, mean_curve
from tests import settings
from tests.tracking.test_uploader import client, database, here

__all__ = ["database", "here"]  # fixtures

TASKS = ["reach-v3", "push-v3"]
COMMAND = "python -m softmod.train env=toy seed=3"
COMMIT = "0123456789" * 4
SWEEP = {
    "id": "5eed",
    "name": "toy: model, seed",
    "runs": "2",
    "fixed": "env=toy\nrun.steps_per_task=400",
    "swept": "model, seed",
    "command": "python -m softmod.train -m env=toy model=soft_modular,mt_sac seed=0",
}


class Trained:
    """A run with two evaluations in its journal, as training leaves it."""

    def __init__(self, model: str, seed: int, sweep: dict[str, str] | None = None) -> None:
        self.folder = Path("runs") / model / f"seed_{seed}"
        self.journal = Journal(self.folder)
        env = {"name": "toy", "tasks": TASKS, "horizon": 20}
        self.journal.params({"model": model, "seed": seed, "env": env})
        self.journal.tags({"softmod.command": COMMAND, "softmod.commit": COMMIT})
        params = {"model": model, "seed": seed}
        metadata = {
            "experiment": "toy",
            "run_name": run_name(params, [f"model={model}"] if sweep else []),
            "sweep": sweep,
        }
        destination.save(self.folder, settings.tracking(), metadata)
        self.journal.status("RUNNING")

    def evaluated(self, step: int, *success: float) -> Trained:
        """Log an evaluation."""
        values = {names.success_rate(task): one for task, one in zip(TASKS, success, strict=True)}
        values |= {names.eval_return(task): 100.0 for task in TASKS}
        self.journal.metrics(values | {names.SUCCESS_MEAN: sum(success) / len(success)}, step)
        return self

    def sent(self) -> Trained:
        """Send what there is, as the uploader does while the run trains."""
        Sender(self.folder).send()
        return self

    def ended(self, status: str | None = "FINISHED") -> Trained:
        """End the run and its upload; None: killed without a status."""
        if status:
            self.journal.status(status)
        self.journal.close()
        sender = Sender(self.folder)
        sender.end()
        sender.send()
        sender.sum_up()
        return self


def found(tag: str = store.RUN_TAG) -> list[Any]:
    """Return the runs with a tag, oldest first."""
    experiment = client().get_experiment_by_name("toy")
    runs = client().search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [run for run in runs if tag in run.data.tags]


def parent() -> Any:
    """Return the run of the sweep."""
    (run,) = found(store.SWEEP_TAG)
    return run


def history(run: Any, name: str) -> list[tuple[int, float]]:
    """Return a metric in MLflow as (step, value) pairs."""
    sent: list[Metric] = client().get_metric_history(run.info.run_id, name)
    return [(one.step, pytest.approx(one.value)) for one in sent]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_fills_every_place(here: Path) -> None:
    Trained("soft_modular", 3).evaluated(200, 1.0, 0.5).evaluated(400, 0.5, 0.25).ended()
    (run,) = found()
    tags = run.data.tags
    assert run.info.run_name == "soft s3"
    assert tags["mlflow.user"] == getpass.getuser()  # "Created by"
    assert tags["mlflow.source.name"] == "softmod.train"  # "Source"
    assert tags["mlflow.source.git.commit"] == COMMIT
    (used,) = run.inputs.dataset_inputs
    dataset: Dataset = used.dataset
    assert dataset.name == "toy (2 tasks)"
    assert json.loads(dataset.source) == {"tasks": TASKS}
    note = tags[store.NOTE_TAG]
    assert note.startswith("**Success 0.375** in the last evaluation, at 400 environment steps")
    assert "the highest was 0.750, at 200" in note
    assert "| reach | 0.50 | push | 0.25 |" in note
    assert COMMAND in note
    assert "`success.png`" in note


def test_the_description_follows_the_evaluations(here: Path) -> None:
    run = Trained("soft_modular", 0).sent()
    assert found()[0].data.tags[store.NOTE_TAG].startswith("No evaluation yet.")
    run.evaluated(200, 1.0, 1.0).sent()
    note = found()[0].data.tags[store.NOTE_TAG]
    assert note.startswith("**Success 1.000**")
    assert "success.png" not in note  # not drawn yet
    run.ended()
    assert "success.png" in found()[0].data.tags[store.NOTE_TAG]


def test_what_a_person_wrote_below_the_description_stays(here: Path) -> None:
    run = Trained("soft_modular", 0).evaluated(200, 1.0, 1.0).sent()
    number = found()[0].info.run_id
    before = found()[0].data.tags[store.NOTE_TAG]
    client().set_tag(number, store.NOTE_TAG, before + "\n\nthe one for the paper")
    run.evaluated(400, 0.0, 0.0).ended()
    after = found()[0].data.tags[store.NOTE_TAG]
    assert after.startswith("**Success 0.000**")
    assert after.endswith(f"{OWN_BELOW}\n\nthe one for the paper")
    assert with_own_lines("new", "all mine", 999) == f"new\n\n{OWN_BELOW}\n\nall mine"
    long = with_own_lines("x" * 999, f"{OWN_BELOW}\nmine", 200)
    assert (len(long), long[-5:]) == (200, "\nmine")


def test_success_is_the_first_section_of_charts(here: Path) -> None:
    """MLflow sorts sections, and lists metrics of `system/` before all others."""
    Trained("soft_modular", 0).evaluated(200, 1.0, 1.0).ended()
    sections = {name.rpartition("/")[0] for name in found()[0].data.metrics}
    others = [names.routing_entropy(1), names.train_success_rate("a"), names.GRADIENTS]
    others += [names.evaluated_success_rate("a"), names.TRAINING_SECONDS, names.USAGE]
    sections |= {name.rpartition("/")[0] for name in others}
    assert min(sections) == "eval/success_rate"
    assert "system" not in sections
    assert not [name for name in Usage(1).read() if "/" in name]


def test_runs_without_a_configuration_are_sent_too(here: Path) -> None:
    """A journal of an earlier version may have neither model nor tasks."""
    journal = Journal(Path("runs/old/seed_0"))
    journal.metrics({"eval/return/a": 1.0, "system/memory_gib": 1.0}, 1)
    journal.status("FINISHED")
    journal.close()
    sender = Sender(journal.folder)
    sender.end()
    sender.send()
    sender.sum_up()
    (run,) = client().search_runs([sender.experiment])
    assert run.info.run_name == "old/seed_0"
    assert set(run.data.metrics) == {"eval/return/a", "system/memory_gib"}
    assert run.data.tags[store.NOTE_TAG].startswith("No evaluation yet.")
    assert run.inputs.dataset_inputs == []


# --- the experiment -------------------------------------------------------------------------------


def test_the_experiment_is_described_and_its_list_shows_success(here: Path) -> None:
    run = Trained("soft_modular", 0).evaluated(200, 1.0, 1.0).sent()
    tags = client().get_experiment_by_name("toy").tags
    assert "on 2 tasks: reach-v3, push-v3" in tags[store.NOTE_TAG]
    assert tags["mlflow.experiment.primaryMetric.name"] == names.SUCCESS_MEAN
    view = dashboard.unpacked(tags[dashboard.VIEW_TAG])
    fifty = dashboard.view([f"a-task-with-a-long-name-{number}-v3" for number in range(50)])
    assert len(dashboard.packed(fifty)) < store.MAX_EXPERIMENT_TAG
    columns = [f"metrics.`{names.success_rate(name)}`" for name in ("mean", *TASKS)]
    assert view["selectedColumns"][:3] == columns
    assert view["columnOrder"][1:4] == columns  # after the name
    assert view["compareRunSections"][0]["name"] == "eval/success_rate"
    assert view["compareRunCharts"][0]["metricKey"] == names.SUCCESS_MEAN
    shown = {f"metrics.`{name}`" for name in client().get_run(found()[0].info.run_id).data.metrics}
    assert set(columns) <= shown
    run.ended()


def test_the_experiments_of_a_store_with_the_latest_run_first(here: Path) -> None:
    assert dashboard.experiments(here / "none.db") == []
    (here / "text.db").write_text("no database")
    assert dashboard.experiments(here / "text.db") == []
    Trained("soft_modular", 0).ended()
    number = client().get_experiment_by_name("toy").experiment_id
    assert dashboard.experiments(here / "mlflow.db") == [(number, "toy")]


PAGE = "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=softmod"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:////a/mlflow.db", f"http://127.0.0.1:5000{PAGE}"),
        ("http://me:hunter2@host:80/", f"http://host:80{PAGE}"),
        ("https://host/mlflow?token=hunter2", f"https://host/mlflow{PAGE}"),
        ("databricks", None),
    ],
)
def test_addresses(uri: str, expected: str | None) -> None:
    assert dashboard.address(uri, "7") == expected


# --- a sweep --------------------------------------------------------------------------------------


def test_a_sweep_is_running_until_its_runs_are_done(here: Path) -> None:
    first = Trained("soft_modular", 0, SWEEP).evaluated(200, 0.0, 0.5).evaluated(400, 1.0, 0.5)
    first.sent()
    assert parent().info.status == "RUNNING"
    first.ended()
    assert parent().info.status == "RUNNING"  # the second run has not begun
    assert parent().data.metrics == {}
    assert "1 finished of 2 runs" in parent().data.tags[store.NOTE_TAG]
    second = Trained("mt_sac", 0, SWEEP).evaluated(200, 1.0, 0.5).evaluated(400, 0.0, 0.0).sent()
    second.ended()
    assert parent().info.status == "FINISHED"
    assert [run.info.run_name for run in found()] == ["soft s0", "sac s0"]

    metrics = parent().data.metrics
    assert metrics[names.SUCCESS_MEAN] == pytest.approx(0.375)
    assert metrics[names.SUCCESS_IQM] == pytest.approx(0.25)  # of 0, 0, 0.5, 1
    assert history(parent(), names.SUCCESS_MEAN) == [(200, 0.5), (400, 0.375)]
    assert history(parent(), names.success_rate("push-v3")) == [(200, 0.5), (400, 0.25)]


def test_a_sweep_fills_every_place(here: Path) -> None:
    Trained("soft_modular", 0, SWEEP).evaluated(200, 1.0, 0.5).ended()
    Trained("mt_sac", 0, SWEEP).evaluated(200, 0.0, 0.0).ended("FAILED")
    run = parent()
    tags = run.data.tags
    assert run.info.status == "FAILED"
    assert run.data.params == {
        "env": "toy",
        "run.steps_per_task": "400",
        "swept": "model, seed",
    }
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == (
        getpass.getuser(),
        "softmod.train",
    )
    assert tags["mlflow.source.git.commit"] == COMMIT
    assert [used.dataset.name for used in run.inputs.dataset_inputs] == ["toy (2 tasks)"]
    note = tags[store.NOTE_TAG]
    assert "**Success 0.750** (mean)" in note
    assert "1 finished of 2 runs" in note
    assert "| reach | 1.00 |" in note
    assert "Not finished: sac s0 (FAILED)" in note
    assert SWEEP["command"] in note


def test_sending_again_changes_nothing(here: Path) -> None:
    runs = [Trained(model, 0, SWEEP).evaluated(200, 1.0, 0.5) for model in ("soft_modular", "sac")]
    for run in runs:
        run.ended()
    with sqlite3.connect(here / "mlflow.db") as connection:
        before = connection.execute("select count(*) from metrics").fetchall()
        for run in runs:
            run.ended(None)
        assert connection.execute("select count(*) from metrics").fetchall() == before
    assert parent().info.status == "FINISHED"


def test_a_sweep_does_not_wait_for_a_run_that_was_deleted(here: Path) -> None:
    for model in ("soft_modular", "sac"):
        Trained(model, 0, SWEEP).evaluated(200, 1.0, 0.5).ended()
    client().delete_run(found()[0].info.run_id)
    extended = SWEEP | {"runs": "3"}
    last = Trained("mt_sac", 0, extended).evaluated(200, 1.0, 0.5).sent()
    assert parent().info.status == "RUNNING"
    last.ended()
    assert parent().info.status == "FINISHED"
    assert len(found()) == 2


@pytest.mark.bar(20)
def test_a_sweep_that_is_killed_and_resumed(here: Path) -> None:
    run = Trained("soft_modular", 0, SWEEP).evaluated(200, 1.0, 0.5).sent()
    run.ended("KILLED")
    assert parent().info.status == "KILLED"  # the second run will not begin
    again = Trained("soft_modular", 0, SWEEP).sent()
    assert parent().info.status == "RUNNING"
    again.ended(None)  # kill -9
    assert (found()[0].info.status, parent().info.status) == ("FAILED", "FAILED")


@pytest.mark.parametrize(
    ("statuses", "expected", "joint"),
    [
        (["FINISHED", "FINISHED"], 2, "FINISHED"),
        (["FINISHED", "FINISHED"], 3, "RUNNING"),
        (["FINISHED", "RUNNING"], 0, "RUNNING"),
        (["FAILED", "FINISHED"], 2, "FAILED"),
        (["FAILED", "KILLED"], 0, "KILLED"),
    ],
)
def test_joint_statuses(statuses: list[str], expected: int, joint: str) -> None:
    assert joint_status(statuses, expected) == joint


def test_joint_success_of_runs_with_other_tasks() -> None:
    joint = joint_success([{"a": 1.0, "b": 0.0}, {"b": 1.0}])
    assert joint[names.SUCCESS_MEAN] == 0.75  # the mean of the runs' means
    assert joint[names.success_rate("b")] == 0.5
    assert joint_success([]) == {}
    assert mean_curve([{1: 0.0, 2: 0.5}, {2: 1.0, 3: 1.0}]) == {2: 0.75}
    assert mean_curve([]) == {}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["model=soft_modular", "seed=3"], [], "soft s3"),
        (["seed=3", "env=toy"], [], "soft_res s3"),
        (["optimizer.actor.lr=1e-3", "seed=3"], [], "soft_res s3 lr=1e-3"),
        (["model=mt_mh_sac_small", "seed=1"], ["model", "seed"], "mh_sac_small s1"),
        (["optimizer.actor.lr=1e-3", "env=toy"], ["optimizer.actor.lr"], "lr=1e-3 s0"),
        (["seed=2", "run.steps_per_task=9000"], ["seed"], "soft_res s2"),
        (["actor.num_modules=2", "model=soft_modular"], ["model", "actor.num_modules"],
         "soft num_modules=2 s0"),
    ],
)  # fmt: skip
def test_names_begin_with_what_differs(overrides: list[str], swept: list[str], name: str) -> None:
    sweep = sweep_identity(parse(["env=toy"]), swept) if swept else None
    found = mlflow_metadata(typed(compose(overrides)), overrides, sweep)["run_name"]
    assert found == name
    assert without_seed("soft lr=1e-3 s12") == "soft lr=1e-3"


def test_runs_that_create_their_sweep_at_the_same_time(here):
    """All end up in the oldest, although a run had entered another."""
    run = Trained("mt_sac", 0, SWEEP).evaluated(800, 0.0, 1.0).sent()
    mlflow = client()
    experiment = mlflow.get_experiment_by_name("toy").experiment_id
    (late,) = store.search(mlflow, experiment, store.SWEEP_TAG, SWEEP["id"])
    early = mlflow.create_run(experiment, start_time=1, tags={store.SWEEP_TAG: SWEEP["id"]})
    run.ended()
    (kept,) = store.search(mlflow, experiment, store.SWEEP_TAG, SWEEP["id"])
    assert kept.info.run_id == early.info.run_id != late.info.run_id
    (member,) = store.search(mlflow, experiment, store.MEMBER_TAG + kept.info.run_id, "member")
    assert member.data.tags[store.PARENT_TAG] == kept.info.run_id
