"""Runs of a report, read from journals or from MLflow, grouped by protocol and by model."""

from __future__ import annotations

import errno
import fnmatch
import glob
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softmod.config.earlier import completed_keys
from softmod.config.identity import NOT_RESULTS
from softmod.errors import ConfigError
from softmod.tracking.names import (
    EARLIER_USAGE,
    SUCCESS_MEAN,
    TRAINING_SECONDS,
    USAGE,
    success_rate,
)
from softmod.tracking.record import JOURNAL, Record

logger = logging.getLogger(__name__)

PROTOCOL = {  # keys that must be equal for success rates to be comparable, with their names
    "env._target_": "environments",
    "env.tasks": "tasks",
    "env.goals": "goals",
    "env.goal_seed": "goal seed",
    "env.reward": "reward",
    "env.horizon": "horizon",
    "run.eval_goals": "goals per task in evaluations during training",
    "run.final_eval_goals": "in the final one",
}
GOALS = ("run.eval_goals", "run.final_eval_goals")
# prefixes of keys and tags that affect times and rates
MACHINE = ("fabric.accelerator", "fabric.precision", "fabric.compile", "machine.")
UNIMPORTANT = [f"{part}.{name}".strip(".") for part, names in NOT_RESULTS.items() for name in names]
# prefixes of keys in which runs of one model may differ
NOT_MODEL = ("env.", "network.", "sweep.", *UNIMPORTANT)
FINISHED = "FINISHED"

Curve = list[tuple[float, float]]


@dataclass
class Run:
    """A run's configuration (dotted keys), metrics (name -> env step -> value) and tags."""

    source: str  # its folder, file or id in MLflow
    status: str
    config: dict[str, Any]
    values: Mapping[str, Mapping[int, float]] = field(repr=False)
    tags: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> int:
        """Return the random seed."""
        return int(self.config["seed"])

    @property
    def machine(self) -> dict[str, str]:
        """Return the keys and tags that affect times and rates."""
        both = {**self.config, **self.tags}
        return {key: str(value) for key, value in both.items() if key.startswith(MACHINE)}

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Return the task names."""
        return tuple(self.config["env.tasks"])

    @property
    def protocol(self) -> tuple[tuple[str, Any], ...]:
        """Return the keys and values that two runs must share to be comparable."""
        config = self.config
        if config.get("env.goals") == "fixed":  # one goal per task, whatever the evaluation's size
            config = config | dict.fromkeys(GOALS, 1)
        return tuple((key, _frozen(config.get(key))) for key in PROTOCOL)

    def success(self) -> NDArray[np.float64]:
        """Return the success rates of the last evaluation, `[task]`."""
        return np.array([self._last(success_rate(task)) for task in self.tasks])

    def curve(self, name: str = SUCCESS_MEAN) -> Curve:
        """Return a metric over environment steps."""
        return [(float(step), value) for step, value in sorted(self.values.get(name, {}).items())]

    def curve_over_time(self, name: str = SUCCESS_MEAN) -> Curve:
        """Return a metric over seconds of training, without values whose time is unknown."""
        seconds = self.values.get(TRAINING_SECONDS, {})
        return [
            (seconds[int(step)], value) for step, value in self.curve(name) if int(step) in seconds
        ]

    def mean_of(self, name: str) -> float:
        """Return a metric's mean over the run, or NaN if it was not logged."""
        values = [value for value in self.values.get(name, {}).values() if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def _last(self, name: str) -> float:
        """Return the last value of a metric.

        Raises:
            ConfigError: It was not logged.
        """
        steps = self.values.get(name)
        if not steps:
            raise ConfigError(f"{self.source}: contains no evaluation ({name})")
        return steps[max(steps)]


@dataclass
class Group:
    """Runs that differ only in their seed."""

    label: str
    model: str
    runs: list[Run]

    def scores(self) -> NDArray[np.float64]:
        """Return the success rates of the last evaluations, `[seed, task]`."""
        return np.stack([run.success() for run in self.runs])


@dataclass
class Comparison:
    """All groups of one protocol."""

    protocol: dict[str, Any]
    groups: list[Group]
    left_out: list[str] = field(default_factory=list)  # excluded runs, each with the reason

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the task names."""
        return self.groups[0].runs[0].tasks


# --- reading --------------------------------------------------------------------------------------


def from_folders(patterns: Iterable[str]) -> list[Run]:
    """Read the runs in these folders and below them.

    Args:
        patterns: Folders, or glob patterns.

    Raises:
        ConfigError: A pattern matches no run, or its folder cannot be read.
    """
    runs = []
    for pattern in patterns:
        found = files_below(pattern, "runs", JOURNAL)
        if not found:
            raise ConfigError(f"runs={pattern}: there is no journal of a run in it")
        for folder in sorted(path.parent for path in found):
            record = Record.read(folder)
            runs.append(
                Run(
                    str(folder),
                    record.status,
                    completed_keys(record.params),
                    record.values,
                    record.tags,
                )
            )
    return runs


def files_below(pattern: str, key: str, name: str) -> list[Path]:
    """Return the files with a name in and below a folder, or each folder of a glob pattern.

    Links are followed; a folder with several paths is visited once.

    Args:
        pattern: the folder or glob pattern.
        key: that it was given for, for messages.
        name: glob pattern of the files' names.

    Raises:
        ConfigError: the folder cannot be read; others are left out with a warning.
    """
    tops = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))

    def refuse(error: OSError) -> None:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        line = f"{key}={pattern}: {error.filename} cannot be read ({error.strerror})"
        if error.filename == pattern:
            raise ConfigError(line) from error
        logger.warning("%s; it is left out", line)

    found = []
    visited = set()
    for top in tops or [pattern]:
        for folder, below, files in os.walk(top, onerror=refuse, followlinks=True):
            if (resolved := os.path.realpath(folder)) in visited:
                below.clear()
                continue
            visited.add(resolved)
            below.sort()
            found += [Path(folder, file) for file in fnmatch.filter(files, name)]
    return found


def from_mlflow(uri: str, sweep: str) -> tuple[str, list[Run]]:
    """Read the runs of a sweep from MLflow.

    Args:
        uri: Address of the MLflow store.
        sweep: Id or name of the sweep's parent run, or the sweep's id.

    Returns:
        The id of the parent run, and the runs.

    Raises:
        ConfigError: The store cannot be read, there is no such sweep, or it has no runs.
    """
    from softmod.tracking.mlflow_store import (
        MEMBER_TAG,
        PARENT_TAG,
        SWEEP_TAG,
        connect,
        database,
    )

    path = database(uri)
    if path is not None and not path.exists():  # MLflow would make one
        raise ConfigError(
            f"sweep={sweep}: there is no MLflow store at {path}; set uri=... to its address"
        )
    try:
        client = connect(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    except Exception as error:  # from MLflow, the database or the network
        raise ConfigError(
            f"sweep={sweep}: {uri} cannot be read ({str(error).splitlines()[0]})"[:300]
        ) from error
    parents = [run for run in _pages(client, experiments, "") if SWEEP_TAG in run.data.tags]
    names = {
        run.info.run_id: (run.info.run_id, run.info.run_name, run.data.tags[SWEEP_TAG])
        for run in parents
    }
    matching = [identifier for identifier, known in names.items() if sweep in known]
    if len(matching) != 1:
        there = (
            "; ".join(f"{run.info.run_name} ({run.info.run_id})" for run in parents)
            or "no sweep at all"
        )
        what = "no such sweep" if not matching else "several sweeps have this name; give the id"
        raise ConfigError(f"sweep={sweep}: {what}; {uri} has {there}")
    members = _pages(client, experiments, f"tags.`{MEMBER_TAG}{matching[0]}` = 'member'")
    shown = _pages(client, experiments, f"tags.`{PARENT_TAG}` = '{matching[0]}'")
    children = {run.info.run_id: run for run in [*members, *shown]}
    if not children:
        raise ConfigError(f"sweep={sweep}: it has no runs")
    return matching[0], [_from_mlflow(client, run) for run in children.values()]


def _pages(client: Any, experiments: list[str], query: str) -> list[Any]:
    """Search MLflow for all runs that match a query, page by page."""
    runs = []
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=500, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _from_mlflow(client: Any, run: Any) -> Run:
    """Convert a run of MLflow, with the values of changed parameters from its tags."""
    from softmod.tracking.mlflow_store import CHANGED

    latest = {
        key.removeprefix(CHANGED): value
        for key, value in run.data.tags.items()
        if key.startswith(CHANGED)
    }
    config = {key: _value(value) for key, value in (run.data.params | latest).items()}
    values = {
        name: {
            metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)
        }
        for name in run.data.metrics
        if not name.startswith((USAGE, EARLIER_USAGE))
    }
    return Run(run.info.run_id, run.info.status, completed_keys(config), values, run.data.tags)


def _value(text: str) -> Any:
    """Parse a value that MLflow stores as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- sorting --------------------------------------------------------------------------------------


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs by protocol and, within it, by all settings except the seed.

    Runs that have not finished are left out and listed. If no run of a protocol finished, its runs
    are listed with the first comparison.

    Raises:
        ConfigError: No run has finished.
    """
    by_protocol: dict[Any, list[Run]] = defaultdict(list)
    lost = []  # runs that belong to no comparison
    for run in runs:
        if {"seed", "model", "env.tasks"} <= run.config.keys():
            by_protocol[run.protocol].append(run)
        else:
            lost.append(f"{run.source}: ended before its configuration was recorded")
    made = []
    for protocol, members in by_protocol.items():
        finished = []
        left_out = []
        seen: dict[tuple[Any, int], str] = {}
        for run in members:
            key = (_frozen(settings(run)), run.seed)
            if run.status != FINISHED:
                left_out.append(f"{run.source}: {run.status or 'no status'}")
            elif key in seen:
                left_out.append(f"{run.source}: the same model and seed as {seen[key]}")
            else:
                seen[key] = run.source
                finished.append(run)
        if finished:
            made.append(Comparison(dict(protocol), _groups(finished), left_out))
        else:
            lost += [
                f"{line} (another protocol: {', '.join(members[0].tasks)})" for line in left_out
            ]
    if not made:
        states = ", ".join(f"{run.source}: {run.status or 'no status'}" for run in runs[:5])
        raise ConfigError(f"no run has finished ({states})")
    made[0].left_out += lost
    return made


def settings(run: Run) -> dict[str, Any]:
    """Return the settings that the runs of a group share, without the model's name."""
    return {
        key: value
        for key, value in run.config.items()
        if not key.startswith(NOT_MODEL) and key != "model"
    }


def _groups(runs: list[Run]) -> list[Group]:
    """Group runs by model and settings; labels add the settings that differ within a model."""
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.config["model"], _frozen(settings(run))].append(run)
    made = []
    for (model, _), members in groups.items():
        rivals = [others[0] for (name, _), others in groups.items() if name == model]
        label = " ".join([model, *_differences(members[0], rivals)])
        made.append(Group(label, model, sorted(members, key=lambda run: run.seed)))
    return sorted(made, key=lambda group: group.label)


def _differences(run: Run, rivals: list[Run]) -> list[str]:
    """List the settings in which a run differs from most others of its model.

    A setting that is equal in actor and critic is listed once.
    """
    own = settings(run)
    others = [settings(rival) for rival in rivals]
    differences: dict[str, str] = {}  # by key
    for key in sorted(own):
        part, _, name = key.partition(".")
        values = [_frozen(other.get(key)) for other in others]
        common = 2 * values.count(_frozen(own[key])) > len(values)
        if part == "critic" and f"actor.{name}" in differences:  # listed already if equal
            common = own[f"actor.{name}"] == own[key]
        if common:
            continue
        if name == "_target_":
            differences[key] = f"{part}={str(own[key]).rpartition('.')[2]}"
        else:
            shown = name if part in ("actor", "algorithm") else key
            differences[key] = f"{shown}={own[key]}"
    return list(differences.values())


def _frozen(value: Any) -> Any:
    """Convert a value to a hashable one; equal numbers stay equal."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
