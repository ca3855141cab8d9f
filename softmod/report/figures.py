"""Figures of a report.

A model has the same color in all of them. The palette is safe for color-blind readers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softmod.report.intervals import by_seed, improvement, interval, iqm
from softmod.report.runs import Comparison, Curve, Group
from softmod.report.tables import Table
from softmod.system.drawing import Axes, EngFormatter, Figure, FigureCanvasAgg, drawn
from softmod.tracking.figures import PALETTE, STYLES

MODELS = (  # a row shares a line style, a column a color; related models have the same color
    "soft_modular", "soft_modular_small", "mt_sac", "mt_mh_sac", "hard_routing", "single_task",
    "mixed_experts",
    "soft_modular_wide", "soft_modular_deep", "mt_sac_small", "mt_mh_sac_small",
    "hard_routing_small", "care",
    "paco", "moore", "soft_modular_paper", "film", "mt_mh_sac_wide",
    "soft_modular_residual", "mt_sac_residual", "mt_mh_sac_residual", "hard_routing_residual",
    "soft_modular_normed",
    "mt_sac_normed",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D")
LOOKS = [
    (color, style, marker)
    for style, marker in zip(STYLES, MARKERS, strict=True)
    for color in PALETTE
]
POINTS = 200  # of a curve
ACROSS = 3  # panels side by side in a figure
WIDE = 34  # characters per line of a label
# largest size of a letter and of a line of a label, in inches
LETTER = 0.083
LINE = 0.18

Look = tuple[str, str, str]  # color, line style, marker


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Assign a look to each label.

    A shipped model has a fixed look. Other groups, and further groups of the same model, get a
    free look, preferably in an unused color.
    """
    names = {group.label: group.model if group.model in MODELS else None for group in groups}
    made: dict[str, Look] = {}
    for label, name in names.items():
        if name is not None and LOOKS[MODELS.index(name)] not in made.values():
            made[label] = LOOKS[MODELS.index(name)]
    for label in names:
        if label not in made:
            free = [look for look in LOOKS if look not in made.values()] or LOOKS
            taken = {color for color, _, _ in made.values()}
            made[label] = next((look for look in free if look[0] not in taken), free[-1])
    return made


def folded(label: str) -> str:
    """Break a long label into several lines."""
    return "\n".join(textwrap.wrap(label, WIDE, break_on_hyphens=False))


def room(labels: Sequence[str]) -> float:
    """Return the height in inches of a legend with these labels and a title."""
    return 0.7 + sum(0.07 + 0.15 * (folded(label).count("\n") + 1) for label in labels)


# --- on a sheet of paper --------------------------------------------------------------------------


def sheet(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a figure; return its path."""
    figure.savefig(path)
    return path


# --- success --------------------------------------------------------------------------------------


@drawn
def intervals(comparison: Comparison, path: Path) -> Path:
    """Draw the IQM over seeds of the task mean per group, with 95 % intervals and seeds as dots."""
    groups = comparison.groups
    names = [folded(group.label) for group in groups]
    figure, axes = sheet(height=1.2 + max(0.45, 0.1 + LINE * most_lines(names)) * len(groups))
    colors = looks(groups)
    for row, group in enumerate(reversed(groups)):
        estimate = interval(iqm, by_seed(group.scores()))
        color = colors[group.label][0]
        axes.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=7, alpha=0.35)
        axes.plot([estimate.value] * 2, [row - 0.28, row + 0.28], color=color, linewidth=2.5)
        axes.plot(
            by_seed(group.scores())[:, 0],
            [row] * len(group.runs),
            "o",
            color=color,
            markersize=3.5,
        )
    axes.set_yticks(range(len(groups)), names[::-1])
    axes.set_xlabel("success: IQM over seeds of the task mean,\n95 % interval; dots are seeds")
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.25)
    return save(figure, path)


@drawn
def heat_map(comparison: Comparison, path: Path) -> Path:
    """Draw the success rate per group and task, mean over seeds."""
    values = np.stack([group.scores().mean(0) for group in comparison.groups])
    rows = [group.label for group in comparison.groups]
    columns = [name_of(task) for task in comparison.tasks]
    return matrix(
        values,
        rows,
        columns,
        "success, mean over seeds",
        path,
        low=0.0,
        high=1.0,
        map_name="viridis",
    )


@drawn
def task_sets(table: Table, path: Path) -> Path:
    """Draw the success rate per task across task sets (`tables.task_sets`)."""
    values = np.array(
        [[np.nan if cell is None else cell for cell in row[2:]] for row in table.rows], float
    )
    rows = [
        f"{label}, {count} {'task' if count == 1 else 'tasks'}" for label, count, *_ in table.rows
    ]
    columns = [name_of(column) for column in table.columns[2:]]
    return matrix(
        values,
        rows,
        columns,
        "success, mean over seeds",
        path,
        low=0.0,
        high=1.0,
        map_name="viridis",
    )


@drawn
def improvement_matrix(comparison: Comparison, path: Path) -> Path:
    """Draw the probability that the row's group is better than the column's."""
    groups = comparison.groups
    values = np.array([[improvement(a.scores(), b.scores()).value for b in groups] for a in groups])
    names = [group.label for group in groups]
    title = "probability that the row\nis better than the column"
    return matrix(values, names, names, title, path, low=0.0, high=1.0, map_name="PuOr")


def matrix(
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: Path,
    low: float,
    high: float,
    map_name: str,
) -> Path:
    """Draw a matrix in colors, with its numbers if it has at most 300 cells.

    Args:
        values: `[row, column]`; NaN cells stay empty.
        rows: Labels of the rows.
        columns: Labels of the columns.
        title: Title of the figure.
        path: File to write.
        low: Value at the lower end of the color map.
        high: Value at the upper end.
        map_name: Color map of Matplotlib.
    """
    rows = [folded(row) for row in rows]
    columns = [folded(column) for column in columns]
    cell_width = max(0.55, 0.1 + 1.5 * LINE * most_lines(columns))
    cell_height = max(0.42, 0.1 + LINE * most_lines(rows))
    figure, axes = sheet(
        max(3.5, 1.2 + LETTER * longest(rows) + cell_width * len(columns)),
        1.2 + 0.7 * LETTER * longest(columns) + cell_height * len(rows),
    )
    image = axes.imshow(values, vmin=low, vmax=high, cmap=map_name, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= 300:
        for row, column in np.ndindex(*values.shape):
            value = values[row, column]
            if np.isnan(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            color = "white" if dark else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color
            )
    figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize="medium")
    return save(figure, path)


def longest(labels: Sequence[str]) -> int:
    """Return the number of letters in the longest line."""
    return max(len(line) for label in labels for line in label.split("\n"))


def most_lines(labels: Sequence[str]) -> int:
    """Return the largest number of lines in a label."""
    return max(label.count("\n") + 1 for label in labels)


def name_of(task: str) -> str:
    """Return a task's name without its version."""
    return task.removesuffix("-v3")


# --- curves ---------------------------------------------------------------------------------------


@drawn
def learning_curves(comparison: Comparison, path: Path, over_time: bool = False) -> Path:
    """Draw mean success over environment steps or over training time.

    Lines are the IQM over seeds, with 95 % bootstrap bands.
    """
    longest = 0.0  # seconds
    for group in comparison.groups:
        for run in group.runs:
            if curve := run.curve_over_time():
                longest = max(longest, curve[-1][0])
    unit = "hours"
    scale = 1 / 3600
    if longest < 2 * 3600:
        unit, scale = ("minutes", 1 / 60) if longest >= 120 else ("seconds", 1.0)
    x_label = f"training time in {unit}" if over_time else "environment steps, all tasks"

    def curves(group: Group) -> list[Curve]:
        return [run.curve_over_time() if over_time else run.curve() for run in group.runs]

    return bands(comparison.groups, curves, x_label, path, scale if over_time else 1.0)


@drawn
def metric_curves(
    comparison: Comparison,
    names: Callable[[Group], dict[str, str]],
    label: str,
    path: Path,
    mark: float | None = None,
) -> Path | None:
    """Draw metrics over environment steps, with a panel per metric and a line per group.

    Logged values are of one batch and noisy. They are drawn thin, with their running mean over a
    tenth of the run on top.

    Args:
        comparison: Groups to draw.
        names: Function that maps a group to its metrics and their titles.
        label: Label of the vertical axis.
        path: File to write.
        mark: Height of a horizontal line.

    Returns:
        The path, or None if no run has the metrics or all values are zero.
    """
    drawn: dict[str, list[tuple[Group, NDArray[np.float64], NDArray[np.float64]]]] = {}
    for group in comparison.groups:
        for metric, title in names(group).items():
            grid, values = on_a_grid([run.curve(metric) for run in group.runs])
            if len(grid) and values.any():  # hard routing has zero entropy
                drawn.setdefault(title, []).append((group, grid, values.mean(0)))
    if not drawn:
        return None
    rows = -(-len(drawn) // ACROSS)
    columns = min(ACROSS, len(drawn))
    height = max(0.9 + 3.0 * rows, room([group.label for group in comparison.groups]))
    figure = Figure(figsize=(3.2 + 3.4 * columns, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colors = looks(comparison.groups)
    lines = {}
    for panel, (title, of_groups) in zip(panels, drawn.items(), strict=False):
        for group, grid, values in of_groups:
            color, style, dot = colors[group.label]
            marker = dot if len(grid) == 1 else ""
            panel.plot(grid, values, color=color, linewidth=0.6, alpha=0.35)
            (lines[folded(group.label)],) = panel.plot(
                grid, running_mean(values), color=color, linestyle=style, marker=marker
            )
        if mark is not None:
            panel.axhline(mark, color="grey", linewidth=0.8)
        panel.set_title(title, fontsize="medium")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(drawn) - columns) : len(drawn)]:  # lowest panel of each column
        panel.tick_params(labelbottom=True)
    figure.supxlabel("environment steps, all tasks", fontsize="medium")
    figure.supylabel(label, fontsize="medium")
    figure.legend(
        lines.values(), lines, loc="outside right upper", frameon=False, fontsize="small",
        title="thin: mean over seeds, as logged\nthick: over a tenth of the run",
        title_fontsize="small",
        alignment="left",
    )  # fmt: skip
    return save(figure, path)


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average each point over a window of a tenth of the curve; NaN values are skipped."""
    if len(values) < 2:
        return values
    window = np.ones(len(values) // 10 // 2 * 2 + 1)
    known = np.isfinite(values)
    sums, counts = (
        np.convolve(part, window, "same")
        for part in (np.where(known, values, 0.0), known.astype(float))
    )
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def bands(
    groups: Sequence[Group],
    curves: Callable[[Group], list[Curve]],
    x_label: str,
    path: Path,
    scale: float,
) -> Path:
    """Draw a line and a band for each group, over the range that all of its seeds cover.

    Args:
        groups: Groups to draw.
        curves: Function that maps a group to a curve per seed.
        x_label: Label of the horizontal axis.
        path: File to write.
        scale: Factor from a curve's abscissa to the unit of the axis.
    """
    figure, axes = sheet(height=max(4.5, room([f"{group.label} (0)" for group in groups])))
    colors = looks(groups)
    for group in groups:
        grid, values = on_a_grid(curves(group))
        color, style, dot = colors[group.label]
        if len(grid) == 0:
            continue
        drawn = np.stack([iqm(part.T[..., None]) for part in resampled_seeds(values)])
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        axes.fill_between(grid * scale, low, high, color=color, alpha=0.15, linewidth=0)
        label = folded(f"{group.label} ({len(group.runs)})")
        marker = dot if len(grid) == 1 else ""
        axes.plot(
            grid * scale,
            iqm(values.T[..., None]),
            color=color,
            linestyle=style,
            marker=marker,
            label=label,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel("success rate, mean of tasks")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.02, 1.02)
    if scale == 1.0:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small",
                  title="IQM over seeds;\nmodel (seeds)",
                  title_fontsize="small", alignment="left")  # fmt: skip
    return save(figure, path)


def resampled_seeds(values: NDArray[np.float64], resamples: int = 300) -> NDArray[np.float64]:
    """Resample whole curves `[seed, point]` with replacement: `[resample, seed, point]`."""
    rows = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    return values[rows]


def on_a_grid(curves: Sequence[Curve]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interpolate curves on common points, from the latest start to the earliest end.

    Returns:
        The abscissa `[point]` and the values `[seed, point]`; both are empty if the curves do not
        overlap.
    """
    arrays = [np.array(curve) for curve in curves if curve]
    if not arrays:
        return np.empty(0), np.empty((0, 0))
    low = max(array[0, 0] for array in arrays)
    high = min(array[-1, 0] for array in arrays)
    if high < low:
        return np.empty(0), np.empty((0, 0))
    grid = np.linspace(low, high, POINTS) if high > low else np.array([low])
    return grid, np.stack([np.interp(grid, array[:, 0], array[:, 1]) for array in arrays])


# --- cost -----------------------------------------------------------------------------------------


@drawn
def capacity(comparison: Comparison, parameters: dict[str, int], path: Path) -> Path | None:
    """Draw success against the parameters of actor and critics.

    Returns:
        The path, or None if the largest model has less than 1.5 times the smallest one's size.
    """
    if not parameters or max(parameters.values()) < 1.5 * min(parameters.values()):
        return None
    figure, axes = sheet(height=max(4.5, room(list(parameters))))
    colors = looks(comparison.groups)
    for group in comparison.groups:
        if group.label in parameters:
            estimate = interval(iqm, by_seed(group.scores()))
            x = parameters[group.label]
            color, _, marker = colors[group.label]
            axes.plot([x, x], [estimate.low, estimate.high], color=color, alpha=0.4, linewidth=4)
            axes.plot(
                [x], [estimate.value], marker, color=color, linestyle="", label=folded(group.label)
            )
    axes.set_xscale("log")
    axes.set_xlabel("parameters, actor and critics")
    axes.set_ylabel("success, IQM over seeds of the task mean")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return save(figure, path)
