"""The run of a sweep in MLflow, which contains the sweep's runs and sums up their success.

Each run's uploader brings it up to date: it is RUNNING until all runs of the sweep have ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from softmod.spec import iqm
from softmod.tracking import mlflow_store as store
from softmod.tracking.descriptions import (
    MAX_COMMAND,
    MAX_GROUPS,
    successes,
    table,
    without_seed,
)
from softmod.tracking.journal import now
from softmod.tracking.names import SUCCESS_IQM, SUCCESS_MEAN, success_rate

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

MAX_LISTED = 12  # runs that are named in a description
MAX_HISTORIES = 200  # curves to read; with more of them only that of the mean is averaged


@dataclass(frozen=True)
class Member:
    """A run of a sweep, as MLflow has it."""

    run: str  # its id
    name: str
    status: str
    scores: dict[str, float]  # success by task, in the last evaluation

    @classmethod
    def of(cls, run: Run) -> Member:
        """Read a run of MLflow."""
        scores = successes(run.data.metrics)
        return cls(run.info.run_id, run.info.run_name or "", run.info.status, scores)

    @property
    def finished(self) -> bool:
        """Return True if the run finished and was evaluated."""
        return self.status == "FINISHED" and bool(self.scores)


class Sweep:
    """A sweep's run in MLflow, found or created.

    Args:
        client: client of the store.
        experiment: id of the experiment.
        sweep: `id` and `name`, and if known `runs` (their number), `command`, `fixed` (overrides,
            one a line) and `swept` (keys).
    """

    def __init__(self, client: MlflowClient, experiment: str, sweep: Mapping[str, str]) -> None:
        self.client = client
        self.experiment = experiment
        self.sweep = sweep
        self.run = self._found()

    def _found(self) -> str:
        """Return the id of the sweep's run, created if it is missing."""
        run, new = store.ensure_parent(self.client, self.experiment, self.sweep)
        if new:
            self._log_params(run)
        return run

    def enter(self, member: str) -> None:
        """Make a run a member, shown below this sweep.

        Runs that began at the same time may have created one each: all enter the oldest, and the
        others are deleted.
        """
        self.run = self._found()
        store.delete_duplicates(
            self.client, self.experiment, store.SWEEP_TAG, self.sweep["id"], keep=self.run
        )
        self.client.set_tag(member, store.PARENT_TAG, self.run)
        self.client.set_tag(member, store.MEMBER_TAG + self.run, "member")

    def resume(self) -> None:
        """Set the status RUNNING: one of the runs is."""
        self.client.update_run(self.run, status="RUNNING")

    def end(self, interrupted: bool) -> None:
        """Set the status that follows from those of the runs, now that one of them has ended.

        Runs that were deleted in the dashboard are not expected any more.

        Args:
            interrupted: it was killed, so that runs that have not begun are not expected.
        """
        number = self.sweep.get("runs", "")
        expected = 0 if interrupted or not number.isdecimal() else int(number)
        runs = self._runs()
        gone = _identities(self._runs(deleted=True)) - _identities(runs)
        status = joint_status([run.info.status for run in runs], expected - len(gone))
        if status == "RUNNING":
            self.resume()
        else:
            self.client.set_terminated(self.run, status, end_time=now())

    def sum_up(self, tags: Mapping[str, str]) -> None:
        """Describe the runs; once all have ended, log mean and interquartile mean of success.

        The metrics follow at the end because MLflow cannot change a value at a step.

        Args:
            tags: tags of the sweep besides its description.
        """
        members = self.members()
        for key, text in tags.items():
            self.client.set_tag(self.run, key, text)
        store.describe_run(self.client, self.run, note(members, self.sweep))
        if self.client.get_run(self.run).info.status != "RUNNING":
            self._log_success([member for member in members if member.finished])

    def _log_success(self, finished: Sequence[Member]) -> None:
        """Log the mean success of the finished runs, at the steps that all of them have."""
        from mlflow.entities import Metric

        joint = joint_success([one.scores for one in finished])
        values: dict[tuple[str, int], float] = {}
        for name in [name for name in joint if name != SUCCESS_IQM]:
            key = store.accepted(name)
            if name == SUCCESS_MEAN or len(joint) * len(finished) <= MAX_HISTORIES:
                curve = mean_curve([self._history(one.run, key) for one in finished])
                values |= {(key, step): value for step, value in curve.items()}
        if not values:
            return
        last = max(step for _, step in values)
        values |= {(store.accepted(name), last): value for name, value in joint.items()}
        known = {
            (key, step): value
            for key in {key for key, _ in values}
            for step, value in self._history(self.run, key).items()
        }
        metrics = [
            Metric(key, value, now(), step)
            for (key, step), value in values.items()
            if known.get((key, step)) != value
        ]
        for batch in store.batches(metrics, store.MAX_METRICS):
            self.client.log_batch(self.run, metrics=batch, synchronous=True)

    def _history(self, run: str, name: str) -> dict[int, float]:
        """Return the latest value of a metric at each step."""
        found = self.client.get_metric_history(run, name)
        return {one.step: one.value for one in sorted(found, key=lambda one: one.timestamp)}

    def members(self) -> list[Member]:
        """Return the runs of the sweep, oldest first."""
        return [Member.of(run) for run in self._runs()]

    def _runs(self, deleted: bool = False) -> list[Run]:
        tag = store.MEMBER_TAG + self.run
        return store.search(self.client, self.experiment, tag, "member", deleted)

    def _log_params(self, run: str) -> None:
        """Log what all runs have in common, and which keys vary."""
        from mlflow.entities import Param

        lines = [line.partition("=") for line in self.sweep.get("fixed", "").splitlines()]
        values = {store.accepted(key): value for key, _, value in lines}
        if swept := self.sweep.get("swept"):
            values["swept"] = swept
        params = [Param(key, value[: store.MAX_PARAM]) for key, value in values.items()]
        for batch in store.batches(params, store.MAX_PARAMS):
            self.client.log_batch(run, params=batch, synchronous=True)


def _identities(runs: Sequence[Run]) -> set[str | None]:
    """Return the ids that runs have in their journals."""
    return {run.data.tags.get(store.RUN_TAG) for run in runs}


def joint_status(statuses: Sequence[str], expected: int) -> str:
    """Return the status of a sweep from those of its runs.

    Args:
        statuses: of the runs that have begun.
        expected: number of runs that the sweep will have.
    """
    if len(statuses) < expected or not set(statuses) <= {"FINISHED", "FAILED", "KILLED"}:
        return "RUNNING"
    return next((status for status in ("KILLED", "FAILED") if status in statuses), "FINISHED")


def joint_success(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return mean and interquartile mean of success over runs and tasks, and the mean by task.

    Args:
        scores: success by task, of each run.
    """
    if not scores:
        return {}
    by_task: dict[str, list[float]] = defaultdict(list)
    for run in scores:
        for task, value in run.items():
            by_task[task].append(value)
    every = np.array([value for values in by_task.values() for value in values])
    means = {success_rate(task): fmean(values) for task, values in by_task.items()}
    own = {
        SUCCESS_MEAN: fmean(fmean(run.values()) for run in scores),
        SUCCESS_IQM: float(iqm(every[:, None])),
    }
    return own | means


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean of curves at the steps that all of them have."""
    if not curves:
        return {}
    shared = set(curves[0]).intersection(*curves)
    return {step: fmean(curve[step] for curve in curves) for step in sorted(shared)}


def note(members: Sequence[Member], sweep: Mapping[str, str]) -> str:
    """Return the description of a sweep, in Markdown."""
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        groups[without_seed(member.name)].append(member)
    finished = [member for member in members if member.finished]
    number = sweep.get("runs", "")
    total = max(len(members), int(number) if number.isdecimal() else 0)
    parts = [f"{len(finished)} of {total} runs finished."]
    if finished:
        metrics = joint_success([one.scores for one in finished])
        parts = [
            f"**Success {metrics[SUCCESS_MEAN]:.3f}** (mean),"
            f" **{metrics[SUCCESS_IQM]:.3f}** (interquartile mean) over"
            f" {len(finished)} finished of {total} runs",
            success_table(groups),
        ]
    if unfinished := [f"{one.name} ({one.status})" for one in members if not one.finished]:
        more = len(unfinished) - MAX_LISTED
        rest = f" and {more} more" if more > 0 else ""
        parts.append(f"Not finished: {', '.join(unfinished[:MAX_LISTED])}{rest}")
    if command := sweep.get("command"):
        parts.append(f"```\n{command[:MAX_COMMAND]}\n```")
    return "\n\n".join(parts)


def success_table(groups: Mapping[str, Sequence[Member]]) -> str:
    """Return a table of success: a column for each configuration, a row for each task."""
    shown = {
        name: [one.scores for one in members if one.finished] for name, members in groups.items()
    }
    shown = {name: scores for name, scores in shown.items() if scores}
    if len(shown) > MAX_GROUPS:  # a row for each configuration instead
        rows = [(name, *_means(scores), str(len(scores))) for name, scores in shown.items()]
        return table(("", "mean", "IQM", "runs"), rows)
    success = [joint_success(scores) for scores in shown.values()]
    tasks = list(dict.fromkeys(task for scores in shown.values() for run in scores for task in run))
    numbers: list[tuple[str, ...]] = [
        ("**mean**", *(f"**{one[SUCCESS_MEAN]:.3f}**" for one in success)),
        ("**IQM**", *(f"**{one[SUCCESS_IQM]:.3f}**" for one in success)),
    ]
    for task in tasks:
        values = [one.get(success_rate(task)) for one in success]
        name = task.removesuffix("-v3")
        numbers.append((name, *("" if value is None else f"{value:.2f}" for value in values)))
    numbers.append(("finished runs", *(str(len(scores)) for scores in shown.values())))
    return table(("", *shown), numbers)


def _means(scores: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    success: dict[str, Any] = joint_success(scores)
    return f"{success[SUCCESS_MEAN]:.3f}", f"{success[SUCCESS_IQM]:.3f}"
