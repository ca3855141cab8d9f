"""The runs of a report: read from journals or from MLflow, sorted by protocol and by model, never
mixed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softmod.config.identity import NOT_RESULTS
from softmod.errors import ConfigError
from softmod.tracking.names import SUCCESS_MEAN, TRAINING_SECONDS, success_rate
from softmod.tracking.record import JOURNAL, Record

PROTOCOL = {  # what makes success rates comparable, as people call it
    "env._target_": "environments",
    "env.tasks": "tasks",
    "env.goals": "goals",
    "env.goal_seed": "goal seed",
    "env.reward": "reward",
    "env.horizon": "horizon",
    "run.eval_goals": "goals per task in evaluations on the way",
    "run.final_eval_goals": "in the last one",
}
GOALS = ("run.eval_goals", "run.final_eval_goals")
# how options and tags begin on which times and rates depend
MACHINE = ("fabric.accelerator", "fabric.precision", "fabric.compile", "machine.")
UNIMPORTANT = [f"{part}.{name}".strip(".") for part, names in NOT_RESULTS.items() for name in names]
NOT_MODEL = (
    "env.",
    "network.",
    "sweep.",
    *UNIMPORTANT,
)  # how the options begin in which runs of a model may differ
FINISHED = "FINISHED"

Curve = list[tuple[float, float]]


@dataclass
class Run:
    """Hold a run's configuration (dotted keys) and its metrics (name -> step -> value)."""

    source: str  # where it was read: a folder, or MLflow's id
    status: str
    config: dict[str, Any]
    values: Mapping[str, Mapping[int, float]] = field(repr=False)
    tags: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def where(self) -> dict[str, str]:
        """On what it ran and how, as far as its times depend on it."""
        told = {**self.config, **self.tags}
        return {key: str(value) for key, value in told.items() if key.startswith(MACHINE)}

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config["env.tasks"])

    @property
    def protocol(self) -> tuple[tuple[str, Any], ...]:
        """Return what has to be equal for two runs to be compared."""
        told = self.config
        if (
            told.get("env.goals") == "fixed"
        ):  # of each task there is one, however many an evaluation asks for
            told = told | dict.fromkeys(GOALS, 1)
        return tuple((key, _frozen(told.get(key))) for key in PROTOCOL)

    def success(self) -> NDArray[np.float64]:
        """Of the last evaluation, per task."""
        return np.array([self._last(success_rate(task)) for task in self.tasks])

    def curve(self, name: str = SUCCESS_MEAN) -> Curve:
        """A metric over environment steps."""
        return [(float(step), value) for step, value in sorted(self.values.get(name, {}).items())]

    def curve_over_time(self, name: str = SUCCESS_MEAN) -> Curve:
        """A metric over the seconds of training; those values whose time is known."""
        seconds = self.values.get(TRAINING_SECONDS, {})
        return [
            (seconds[int(step)], value) for step, value in self.curve(name) if int(step) in seconds
        ]

    def mean_of(self, name: str) -> float:
        """A metric's mean over the run; NaN where there is none."""
        values = [value for value in self.values.get(name, {}).values() if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def _last(self, name: str) -> float:
        steps = self.values.get(name)
        if not steps:
            raise ConfigError(f"{self.source}: no evaluation in it ({name})")
        return steps[max(steps)]


@dataclass
class Group:
    """Runs that differ in their seed only."""

    label: str
    model: str
    runs: list[Run]

    def scores(self) -> NDArray[np.float64]:
        """Success of the last evaluations `[seed, task]`."""
        return np.stack([run.success() for run in self.runs])


@dataclass
class Comparison:
    """All groups of one protocol."""

    protocol: dict[str, Any]
    groups: list[Group]
    left_out: list[str] = field(default_factory=list)  # runs that do not count, and why

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.groups[0].runs[0].tasks


# --- reading --------------------------------------------------------------------------------------


def from_folders(patterns: Iterable[str]) -> list[Run]:
    """The runs whose folders match.

    Raises:
        ConfigError: nothing matches.
    """
    runs = []
    for pattern in patterns:
        top = Path(pattern)
        places = (
            [top] if top.exists() else sorted(Path().glob(pattern)) if not top.is_absolute() else []
        )
        found = sorted({path.parent for place in places for path in place.rglob(JOURNAL)})
        if not found:
            raise ConfigError(f"runs={pattern}: no journal of a run there")
        for folder in found:
            record = Record.read(folder)
            runs.append(
                Run(str(folder), record.status, renamed(record.params), record.values, record.tags)
            )
    return runs


def from_mlflow(uri: str, sweep: str) -> tuple[str, list[Run]]:
    """The id of a sweep's parent run, and the runs under it; `sweep` is the parent's id or name, or
    the sweep's id.

    Raises:
        ConfigError: the store cannot be read, there is no such sweep, or it has no runs.
    """
    from softmod.tracking.mlflow_store import MEMBER_TAG, PARENT_TAG, SWEEP_TAG, database

    path = database(uri)
    if path is not None and not path.exists():  # MLflow would make one
        raise ConfigError(
            f"sweep={sweep}: there is no MLflow store at {path}; uri=... says where it is"
        )
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    except Exception as error:  # MLflow's own, and those of the database or the network below
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
        what = "no such sweep" if not matching else "more than one sweep of this name: take its id"
        raise ConfigError(f"sweep={sweep}: {what}; in {uri} there is {there}")
    members = _pages(client, experiments, f"tags.`{MEMBER_TAG}{matching[0]}` = 'member'")
    shown = _pages(client, experiments, f"tags.`{PARENT_TAG}` = '{matching[0]}'")
    children = {run.info.run_id: run for run in [*members, *shown]}
    if not children:
        raise ConfigError(f"sweep={sweep}: it has no runs")
    return matching[0], [_from_mlflow(client, run) for run in children.values()]


def _pages(client: Any, experiments: list[str], query: str) -> list[Any]:
    runs = []
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=500, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _from_mlflow(client: Any, run: Any) -> Run:
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
        if not name.startswith("system/")
    }
    return Run(run.info.run_id, run.info.status, renamed(config), values, run.data.tags)


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run under today's names; `model` was `method` once."""
    return {"model" if key == "method" else key: value for key, value in config.items()}


def _value(text: str) -> Any:
    """What MLflow keeps as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- sorting --------------------------------------------------------------------------------------


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Runs by protocol and, within it, by everything but the seed; those that have not finished are
    left out.

    What cannot be told under a protocol of its own, since nothing finished there, is told with the
    first.

    Raises:
        ConfigError: no run has finished.
    """
    by_protocol: dict[Any, list[Run]] = defaultdict(list)
    lost = []  # runs that no comparison tells of
    for run in runs:
        if {"seed", "model", "env.tasks"} <= run.config.keys():
            by_protocol[run.protocol].append(run)
        else:
            lost.append(f"{run.source}: ended before it told its configuration")
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
    """The part of a run's configuration that the runs of a group share, but for the
    model's name.
    """
    return {
        key: value
        for key, value in run.config.items()
        if not key.startswith(NOT_MODEL) and key != "model"
    }


def _groups(runs: list[Run]) -> list[Group]:
    """Runs by model and settings; what tells groups of one model apart is added to their label."""
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
    """In which options a run differs from most others of its model; what actor and critic share is
    said once.
    """
    own = settings(run)
    others = [settings(rival) for rival in rivals]
    told: dict[str, str] = {}  # by key
    for key in sorted(own):
        part, _, name = key.partition(".")
        values = [_frozen(other.get(key)) for other in others]
        common = 2 * values.count(_frozen(own[key])) > len(values)
        if part == "critic" and f"actor.{name}" in told:  # which says it of both, unless
            common = own[f"actor.{name}"] == own[key]
        if common:
            continue
        if name == "_target_":
            told[key] = f"{part}={str(own[key]).rpartition('.')[2]}"
        else:
            told[key] = f"{name if part in ('actor', 'algorithm') else key}={own[key]}"
    return list(told.values())


def _frozen(value: Any) -> Any:
    """The value as something that can be a key; numbers that are equal are one."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
