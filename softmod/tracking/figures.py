"""Figures of a run: success rates over training, and routing probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from softmod.system.drawing import Axes, EngFormatter, Figure, FigureCanvasAgg, drawn
from softmod.tracking.names import SUCCESS_MEAN, success_rate
from softmod.tracking.record import Routes

# Okabe and Ito (2008): distinguishable with any color vision; black is reserved for the mean
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#B8A800")
STYLES = ("-", "--", ":", "-.")
MAX_LEGEND = 12  # tasks; with more of them only the mean is labelled


Image = NDArray[np.uint8]


class HasHistory(Protocol):
    """Source of metrics: a `Journal`, or a `Record` read from a run's folder."""

    def names(self) -> list[str]:
        """Return the names of the metrics."""

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return a metric as (step, value) pairs, by step."""


@drawn
def success_figure(journal: HasHistory, path: Path) -> None:
    """Draw the success rate of every task, and their mean, over env steps, as a PNG at `path`."""
    prefix = success_rate("")
    tasks = [name for name in journal.names() if name.startswith(prefix) and name != SUCCESS_MEAN]
    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    many = len(tasks) > MAX_LEGEND
    for index, name in enumerate(tasks):
        look = {
            "color": PALETTE[index % len(PALETTE)],
            "linestyle": STYLES[index // len(PALETTE) % len(STYLES)],
        }
        label = f"_{name}" if many else name.removeprefix(prefix)
        _line(
            axes,
            journal.history(name),
            label,
            linewidth=0.6 if many else 1.2,
            alpha=0.5 if many else 0.9,
            **look,
        )
    mean = f"mean of {len(tasks)} tasks" if many else "mean"
    _line(axes, journal.history(SUCCESS_MEAN), mean, color="black", linewidth=2.8, zorder=5)
    _frame(axes)
    if many:
        axes.legend(loc="upper left")
    else:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path)


@drawn
def routes_figure(step: int, tasks: Sequence[str], layers: Sequence[Routes]) -> Image:
    """Draw each task's routing probabilities as a heat map with one panel per layer.

    Args:
        step: env steps, for the title.
        tasks: names of the tasks.
        layers: probabilities `[task][target][source]` per layer.

    Returns:
        The image, `[height, width, 3]`.
    """
    figure = Figure(
        figsize=(2.2 + 1.9 * len(layers), 1.6 + 0.24 * len(tasks)), dpi=110, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for number, (axes, layer) in enumerate(zip(panels, layers, strict=True), 1):
        values = np.asarray(layer)
        _, targets, sources = values.shape
        shown = axes.imshow(
            values.reshape(len(tasks), -1), vmin=0, vmax=1, cmap="viridis", aspect="auto"
        )
        for target in range(1, targets):
            axes.axvline(target * sources - 0.5, color="white", linewidth=2)
        axes.set_xticks([])
        axes.set_xlabel(f"{targets} x {sources}")
        axes.set_title(f"layer {number}", fontsize=9)
    panels[0].set_yticks(
        range(len(tasks)), [task.removesuffix("-v3") for task in tasks], fontsize=8
    )
    figure.colorbar(shown, ax=panels, label="probability")
    figure.suptitle(f"routing at {step:,} env steps: task by (target, source)", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _line(axes: Axes, history: list[tuple[int, float]], label: str, **look: object) -> None:
    steps = [step for step, _ in history]
    values = [value for _, value in history]
    marker = "o" if len(history) == 1 else ""  # a single evaluation has no line
    axes.plot(steps, values, label=label, marker=marker, markersize=4, **look)  # type: ignore[arg-type]


def _frame(axes: Axes) -> None:
    axes.set_xlabel("environment steps, all tasks")
    axes.set_ylabel("success rate")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
