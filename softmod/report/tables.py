"""Tables of a report: rows of plain values, written as CSV, LaTeX and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pandas import DataFrame

from softmod.report.intervals import (
    Interval,
    by_seed,
    improvement,
    interval,
    iqm,
    mean,
    steps_to_reach,
)
from softmod.report.runs import Comparison, Group
from softmod.tracking.names import ENV_STEPS_PER_SECOND, TRAINING_SECONDS, UPDATES_PER_SECOND

Cell = str | int | float | Interval | None
# maps a group to the actor's parameters, the critics' parameters, and the GFLOP of an update
Cost = Callable[[Group], tuple[int, int, float] | None]


MOST_COLUMNS = 12  # tasks that a table for a README shows as columns


@dataclass
class Table:
    """A table with a caption, columns and rows; its files are named `name`."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]

    def write(self, folder: Path) -> None:
        """Write `<name>.csv`, `<name>.md` and `<name>.tex`."""
        (folder / f"{self.name}.csv").write_text(self.as_csv(), encoding="utf-8")
        (folder / f"{self.name}.md").write_text(self.as_markdown(), encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(self.as_latex(), encoding="utf-8")

    def shown(self) -> list[list[str]]:
        """Format all cells for readers."""
        return [[shown(cell) for cell in row] for row in self.rows]

    def as_csv(self) -> str:
        """Return CSV text with plain numbers; an interval becomes three columns."""
        columns: dict[str, list[object]] = {}
        for index, name in enumerate(self.columns):
            cells = [row[index] for row in self.rows]
            if any(isinstance(cell, Interval) for cell in cells):
                for part, suffix in enumerate(("", ", low", ", high")):
                    columns[f"{name}{suffix}"] = [_part(cell, part) for cell in cells]
            else:
                columns[name] = list(cells)
        return str(DataFrame(columns, dtype=object).to_csv(index=False))

    def as_latex(self) -> str:
        """Return a LaTeX `tabular` for booktabs."""
        form = "l" + "r" * (len(self.columns) - 1)
        cells = DataFrame(self.shown(), columns=self.columns).replace("–", "--")
        return str(cells.to_latex(index=False, escape=True, column_format=form))

    def as_html(self) -> str:
        """Return an HTML table for a notebook."""
        return str(DataFrame(self.shown(), columns=self.columns).to_html(index=False, border=0))

    def as_markdown(self) -> str:
        """Return a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.shown()]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _part(cell: Cell, part: int) -> object:
    """Return a part of an interval (value, low, high); a plain cell is its own first part."""
    if isinstance(cell, Interval):
        return cell[part]
    return cell if part == 0 else None


def shown(cell: Cell) -> str:
    """Format a cell for readers."""
    if isinstance(cell, Interval) and math.isnan(cell.low):
        return f"{cell.value:.3f}"
    if isinstance(cell, Interval):
        return f"{cell.value:.3f} ({cell.low:.3f} to {cell.high:.3f})"
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


# --- content --------------------------------------------------------------------------------------


def success(comparison: Comparison) -> Table:
    """Tabulate success per model: mean and IQM over seeds, and IQM over seeds and tasks."""
    rows: list[list[Cell]] = []
    for group in comparison.groups:
        scores = group.scores()
        rows.append(
            [group.label, len(scores), interval(mean, by_seed(scores)), interval(iqm,
                                                                                 by_seed(scores)),
             interval(iqm, scores)]
        )  # fmt: skip
    caption = "Success of the last evaluation, with 95 % stratified bootstrap intervals"
    if min(len(group.runs) for group in comparison.groups) < 5:
        caption += "; intervals of fewer than five seeds are unreliable, a single seed has none"
    columns = [
        "model",
        "seeds",
        "mean",
        "IQM over seeds of the task mean",
        "IQM over seeds and tasks",
    ]
    return Table("success", caption, columns, rows)


def per_task(comparison: Comparison) -> Table:
    """Tabulate success per model and task, mean over seeds."""
    rows: list[list[Cell]] = [
        [g.label, *(float(value) for value in g.scores().mean(0))] for g in comparison.groups
    ]
    return Table("tasks", "Success per task, mean over seeds", ["model", *comparison.tasks], rows)


def per_seed(comparison: Comparison) -> Table:
    """Tabulate each run's last success per task, with its env steps and minutes."""
    rows: list[list[Cell]] = []
    for group in comparison.groups:
        for run in group.runs:
            scores, (steps, _) = run.success(), run.curve()[-1]
            seconds = run.values.get(TRAINING_SECONDS, {}).get(int(steps), math.nan)
            cells: list[Cell] = [round(float(value), 3) for value in (*scores, scores.mean())]
            rows.append([group.label, run.seed, int(steps), round(seconds / 60, 1), *cells])
    columns = ["model", "seed", "env steps", "minutes", *comparison.tasks, "mean"]
    return Table("seeds", "Success per seed and task, in the last evaluation", columns, rows)


def readme(comparison: Comparison) -> Table:
    """Tabulate success per seed for a README: short task names, no column for a single model.

    With more than `MOST_COLUMNS` tasks, tasks are the rows and seeds the columns.
    """
    table = per_seed(comparison)
    single = len(comparison.groups) == 1
    columns = [column.removesuffix("-v3") for column in table.columns]
    scores = len(comparison.tasks) + 1  # at the end of a row
    rows = [
        [*row[single:-scores], *(f"{cell:.2f}" for cell in row[-scores:])] for row in table.rows
    ]
    if len(comparison.tasks) <= MOST_COLUMNS:
        return Table("readme", table.caption, columns[single:], rows)
    names = [f"seed {row[0]}" if single else f"{row[0]}, seed {row[1]}" for row in rows]
    cells = zip(columns[-scores:], *(row[-scores:] for row in rows), strict=True)
    return Table("readme", table.caption, ["task", *names], [list(line) for line in cells])


def task_sets(found: Sequence[Comparison]) -> Table:
    """Tabulate success per task, mean over seeds, with a row per model and task set."""
    tasks = list(dict.fromkeys(task for comparison in found for task in comparison.tasks))
    rows: list[list[Cell]] = []
    for comparison in sorted(found, key=lambda one: len(one.tasks)):
        for group in comparison.groups:
            known = dict(zip(comparison.tasks, map(float, group.scores().mean(0)), strict=True))
            rows.append([group.label, len(comparison.tasks), *(known.get(task) for task in tasks)])
    caption = (
        "Success per task, mean over seeds, for each task set; goals are those of MT10 or MT25"
        " for exactly these sets, and those of MT50 for all others"
    )
    return Table("task_sets", caption, ["model", "tasks in the set", *tasks], rows)


def improvements(comparison: Comparison) -> Table:
    """Tabulate the probability of improvement for every ordered pair of models."""
    rows: list[list[Cell]] = [
        [ours.label, theirs.label, improvement(ours.scores(), theirs.scores())]
        for ours in comparison.groups
        for theirs in comparison.groups
        if ours is not theirs
    ]
    caption = (
        "Probability that a run of the first model is better on a task than one of the second"
        " (ties count half)"
    )
    return Table("improvement", caption, ["model", "against", "probability"], rows)


def efficiency(comparison: Comparison, level: float, cost: Cost) -> Table:
    """Tabulate env steps to a success rate `level`, parameters, FLOP and throughput per model."""
    rows: list[list[Cell]] = []
    for group in comparison.groups:
        reached = [
            steps_to_reach(
                np.array([x for x, _ in curve], int), np.array([y for _, y in curve]), level
            )
            for curve in (run.curve() for run in group.runs)
        ]
        known = [value for value in reached if not math.isnan(value)]
        sizes = cost(group)
        rows.append(
            [group.label, f"{len(known)} of {len(reached)}",
             float(np.median(known)) if known else None,
             *(sizes if sizes else (None, None, None)),
             _average(group, ENV_STEPS_PER_SECOND), _average(group, UPDATES_PER_SECOND)]
        )  # fmt: skip
    columns = ["model", f"runs that reach {level:g}", "env steps until then, median",
               "parameters, actor",
               "parameters, critics", "GFLOP per update", "env steps/s", "updates/s"]  # fmt: skip
    caption = f"Sample efficiency and cost; the level is {level:g} of mean success in an evaluation"
    return Table("efficiency", caption, columns, rows)


def _average(group: Group, name: str) -> float:
    """Average a metric over a group's runs; NaN if no run logged it."""
    values = [value for value in (run.mean_of(name) for run in group.runs) if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def published(rows: Sequence[dict[str, object]]) -> Table:
    """Tabulate published results with their protocols."""
    keys = ["benchmark", "model", "success", "statistic", "protocol", "source"]
    columns = ["success, %" if key == "success" else key for key in keys]
    cells: list[list[Cell]] = [[_plain(row.get(key)) for key in keys] for row in rows]
    return Table(
        "published",
        "Published results; their protocols differ from those of the runs above",
        columns,
        cells,
    )


def _plain(value: object) -> Cell:
    """Return a value that a cell can hold, else None."""
    return value if isinstance(value, str | int | float) else None
