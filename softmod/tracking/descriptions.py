"""Names and texts of runs, sweeps and experiments, as people read them in MLflow."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softmod.tracking.names import SUCCESS, SUCCESS_IQM, SUCCESS_MEAN
from softmod.tracking.record import Line, Record

ABBREVIATIONS = (  # of models in names: MLflow's list shows about 20 characters
    ("soft_modular", "soft"),
    ("hard_routing", "hard"),
    ("mt_mh_sac", "mh_sac"),
    ("mt_sac", "sac"),
    ("mixed_experts", "experts"),
    ("single_task", "single"),
    ("_residual", "_res"),
)
BY_VALUE = ("model", "variant", "env", "algorithm", "experiment", "sweep")  # named by their options
SEEDS = ("seed", "seeds")
OWN_BELOW = "*softmod writes the lines above. Your own lines below this one are kept.*"
MAX_COMMAND = 2000  # characters
MAX_NAME = 200  # characters of a task set's name
MAX_GROUPS = 8  # columns of a table
MAX_PAIRS = 4  # tasks in a row of a table


# --- names ----------------------------------------------------------------------------------------


def short_model(model: str) -> str:
    """Abbreviate the name of a model, as in `soft_res` for `soft_modular_residual`."""
    for long, short in ABBREVIATIONS:
        model = model.replace(long, short)
    return model


def short_override(override: str) -> str:
    """Abbreviate an override: the value of a group, or the last part of a key with its value."""
    key, _, value = override.partition("=")
    group = key.partition("@")[0]
    if group == "model":
        return short_model(value)
    return value if group in BY_VALUE else f"{key.rpartition('.')[2]}={value}"


def run_name(
    params: Mapping[str, Any], swept: Iterable[str] = (), others: Iterable[str] = ()
) -> str:
    """Return the name of a run, which begins with what differs, as in `soft s3`.

    Args:
        params: configuration of the run, with `model` and `seed`.
        swept: its overrides of the keys that a sweep varies.
        others: its other overrides.

    Returns:
        The name; empty if the configuration is unknown.
    """
    if not {"model", "seed"} <= params.keys():
        return ""
    first = [line for line in swept if key_of(line) not in SEEDS]
    first.sort(key=lambda line: key_of(line) != "model")  # the model before the rest
    words = [short_override(line) for line in first] or [short_model(str(params["model"]))]
    last = [short_override(line) for line in others if key_of(line) not in (*SEEDS, "model")]
    return " ".join([*words, f"s{params['seed']}", *last])


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.partition("=")[0]


def without_seed(name: str) -> str:
    """Return what the names of a configuration's runs have in common: `soft` of `soft s3`."""
    return " ".join(word for word in name.split() if not re.fullmatch(r"s\d+", word))


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Summary:
    """Content of a run's description, collected from its journal."""

    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = ""
    env_steps: int = 0  # at the last evaluation
    scores: dict[str, float] = field(default_factory=dict)  # success by task, at that evaluation
    mean: float | None = None
    best: tuple[float, int] | None = None  # highest mean success, and its env steps

    @classmethod
    def of(cls, record: Record) -> Summary:
        """Summarize a journal."""
        summary = cls(dict(record.params), dict(record.tags), record.status)
        for step, _ in record.history(SUCCESS_MEAN):
            values = {name: record.values[name][step] for name in record.names_at(step)}
            summary.evaluation(step, values)
        return summary

    def absorb(self, line: Line) -> None:
        """Add a line of the journal; it may have been added before."""
        match line["kind"]:
            case "params":
                self.params |= line["values"]
            case "tags":
                self.tags |= line["values"]
            case "status":
                self.status = line["status"]
            case "metrics" if SUCCESS_MEAN in line["values"]:
                values = {name: float(value) for name, value in line["values"].items()}
                self.evaluation(line["step"], values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of an evaluation."""
        mean = values[SUCCESS_MEAN]
        if step >= self.env_steps:
            self.env_steps = step
            self.mean = mean
            self.scores = successes(values)
        if self.best is None or mean > self.best[0]:
            self.best = mean, step

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks, in the order of the configuration."""
        tasks = self.params.get("env.tasks")
        return [str(task) for task in tasks] if isinstance(tasks, list) else list(self.scores)

    def note(self) -> str:
        """Return the description of the run, in Markdown."""
        parts = ["No evaluation yet."]
        if self.mean is not None and self.best is not None:
            highest = f"; the highest was {self.best[0]:.3f}, at {self.best[1]:,}"
            last = "" if self.best[1] == self.env_steps else highest
            parts = [
                f"**Success {self.mean:.3f}** in the last evaluation, at {self.env_steps:,}"
                f" environment steps{last}",
                self._table(),
            ]
        if command := self.tags.get("softmod.command"):
            parts.append(f"```\n{str(command)[:MAX_COMMAND]}\n```")
        if self.status == "FINISHED":
            parts.append(
                "Artifacts: `success.png` (success over training), `evaluation.json`,"
                " `checkpoints/best` (the weights with the highest success), `train.log`"
            )
        return "\n\n".join(parts)

    def _table(self) -> str:
        """Return a table of success, wide rather than long: MLflow shows its first lines only."""
        shown = [task for task in self.tasks if task in self.scores]
        cells = [(task.removesuffix("-v3"), f"{self.scores[task]:.2f}") for task in shown]
        width = min(MAX_PAIRS, len(cells))
        rows = [cells[start : start + width] for start in range(0, len(cells), width)]
        return table(("task", "success") * width, [itertools.chain(*row) for row in rows])

    def source_tags(self, user: str) -> dict[str, str]:
        """Return MLflow's tags of who ran what.

        Args:
            user: name of the user.
        """
        command = str(self.tags.get("softmod.command", "")).split()
        modules = [word for word in command if word.startswith("softmod.")]
        tags = {
            "mlflow.user": user,
            "mlflow.source.name": modules[0] if modules else "softmod.train",
            "mlflow.source.type": "LOCAL",
        }
        if commit := self.tags.get("softmod.commit"):
            tags["mlflow.source.git.commit"] = str(commit)
        return tags


@dataclass(frozen=True)
class TaskSet:
    """The task set of a run, for MLflow's list of data sets."""

    name: str
    digest: str  # of everything in `env`
    tasks: list[str]

    @classmethod
    def of(cls, summary: Summary) -> TaskSet | None:
        """Return the task set of a run; None if its configuration is unknown."""
        own = {key: value for key, value in summary.params.items() if key.startswith("env.")}
        tasks = summary.tasks
        if not own or not tasks:
            return None
        name = str(own.get("env.name", "tasks"))
        number = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
        return cls(f"{name[:MAX_NAME]} ({number})", digest, tasks)


# --- an experiment --------------------------------------------------------------------------------


def experiment_note(summary: Summary) -> str:
    """Return the description of an experiment, in Markdown, by one of its runs."""
    tasks = summary.tasks
    return (
        f"Multi-task reinforcement learning on {len(tasks)} tasks: {', '.join(tasks)}.\n\n"
        "`eval/success_rate/mean` is the mean success rate over tasks in an evaluation, "
        "`eval/success_rate/<task>` that of a task. The x-axis of all charts is environment steps "
        "over all tasks. A sweep is a run that contains its runs; its success is the mean over "
        "those that finished."
    )


def successes(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the success rate of each task in metrics of an evaluation, without their means."""
    return {
        name.removeprefix(SUCCESS): value
        for name, value in metrics.items()
        if name.startswith(SUCCESS) and name not in (SUCCESS_MEAN, SUCCESS_IQM)
    }


# --- Markdown -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_own_lines(text: str, before: str, limit: int) -> str:
    """Return a description that keeps what a person wrote into the previous one.

    Args:
        text: the new description; cut off if there is not enough room.
        before: the previous one, possibly edited by a person; empty if there is none.
        limit: characters that MLflow stores.
    """
    _, mark, own = before.partition(OWN_BELOW)
    kept = own if mark else f"\n\n{before}" if before else ""
    below = f"\n\n{OWN_BELOW}{kept}"
    return (text[: max(0, limit - len(below))] + below)[:limit]
