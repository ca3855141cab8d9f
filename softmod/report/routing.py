"""Routing of a policy over rollouts: graphs, courses, similarities, and a map of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softmod.checkpoint.load import TrainedPolicy
from softmod.report.figures import matrix, name_of, save, sheet
from softmod.system.drawing import Axes, Figure, FigureCanvasAgg, drawn
from softmod.tracking.figures import PALETTE, STYLES

Layer = NDArray[np.float64]  # [target, source], or [step, target, source]

STATES = 200  # of each task on the map, at most
POINTS = 41  # of a course
MARKERS = "osD^vP*X<>"


@dataclass
class Rollouts:
    """Routing probabilities over some episodes of one task."""

    task: str
    layers: list[Layer]  # [step, target, source] per routing layer
    successes: int
    lengths: list[int]  # steps of each episode

    @property
    def episodes(self) -> int:
        """Return the number of episodes."""
        return len(self.lengths)

    def vectors(self) -> NDArray[np.float64]:
        """Concatenate all probabilities of each step: `[step, connection]`."""
        return np.concatenate([layer.reshape(len(layer), -1) for layer in self.layers], 1)

    def by_episode(self, layer: int) -> list[NDArray[np.float64]]:
        """Return the probabilities of a routing layer, `[step, connection]` per episode."""
        flat = self.layers[layer].reshape(len(self.layers[layer]), -1)
        return np.split(flat, np.cumsum(self.lengths)[:-1])

    def means(self) -> list[Layer]:
        """Average over steps: `[target, source]` per routing layer."""
        return [layer.mean(0) for layer in self.layers]


def roll_out(policy: TrainedPolicy, episodes: int = 5) -> list[Rollouts]:
    """Play episodes of each task on its first goals, with the deterministic policy.

    Returns:
        Rollouts per task, or an empty list if the network does not route.
    """
    made = []
    for index, task in enumerate(policy.tasks):
        played = [
            policy.episode(index, goal)
            for goal in range(min(episodes, len(policy.suite.goals(index))))
        ]
        states = np.concatenate([obs for obs, _ in played])
        layers = [np.asarray(layer, np.float64) for layer in policy.routing(states, index)]
        if not layers:
            return []
        successes = sum(success for _, success in played)
        made.append(Rollouts(task, layers, successes, [len(obs) for obs, _ in played]))
    return made


# --- graphs ---------------------------------------------------------------------------------------


@drawn
def graphs(rollouts: Sequence[Rollouts], path: Path) -> Path:
    """Draw the routing graph of each task.

    Modules are dots. The width of a connection is its mean probability.
    """
    columns = min(5, len(rollouts))
    rows = -(-len(rollouts) // columns)
    figure = Figure(
        figsize=(max(4.0, 2.9 * columns), 2.7 * rows + 0.5), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for task, (axes, one) in enumerate(zip(panels, rollouts, strict=False)):
        draw_graph(axes, one.means(), PALETTE[task % len(PALETTE)])
        axes.set_title(
            f"{name_of(one.task)} ({one.successes} of {one.episodes} solved)", fontsize=9
        )
    for axes in list(figure.axes)[len(rollouts) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "routing probabilities, mean over all steps of the episodes;\nleft to right: layers of"
        " modules, output",
        fontsize=8,
    )
    return save(figure, path)


def draw_graph(
    axes: Axes, layers: Sequence[Layer], color: str, numbers: bool = True, dot: float = 9.0
) -> None:
    """Draw a routing graph.

    Args:
        axes: Axes to draw in.
        layers: Probabilities `[target, source]` per routing layer.
        color: Color of the connections.
        numbers: Write numbers at the connections well above uniform probability.
        dot: Size of a module, in points.
    """
    counts = [layers[0].shape[1], *(layer.shape[0] for layer in layers)]
    modules = [_column(x, count) for x, count in enumerate(counts)]
    for (sources, targets), layer in zip(pairwise(modules), layers, strict=True):
        for target, source in np.ndindex(*layer.shape):
            probability = float(layer[target, source])
            (x0, y0), (x1, y1) = sources[source], targets[target]
            axes.plot([x0, x1], [y0, y1], color=color, linewidth=0.3 + 5.0 * probability,
                      alpha=0.1 + 0.8 * probability,
                      solid_capstyle="round", zorder=1)  # fmt: skip
            if numbers and probability > 1.2 / layer.shape[1]:
                axes.text(
                    x0 + 0.3 * (x1 - x0),
                    y0 + 0.3 * (y1 - y0),
                    f"{probability:.2f}",
                    fontsize=6,
                    zorder=3,
                )
    for column in modules:
        axes.plot(
            *zip(*column, strict=True),
            "o",
            color="white",
            markeredgecolor="#333333",
            markersize=dot,
            zorder=2,
        )
    axes.set_xlim(-0.3, len(counts) - 0.7)
    axes.set_ylim(-1.25, 1.25)
    axes.set_axis_off()


def _column(x: int, count: int) -> list[tuple[float, float]]:
    """Return the coordinates of a layer's modules, from top to bottom."""
    return [(float(x), float(y)) for y in (np.linspace(1, -1, count) if count > 1 else [0.0])]


# --- along an episode -----------------------------------------------------------------------------


def course(one: Rollouts, layer: int) -> NDArray[np.float64]:
    """Compute the weights of a layer's source modules along an episode.

    A weight is the mean probability over targets and episodes. Episodes are stretched to the same
    length.

    Returns:
        `[point, source]`, at `POINTS` points from the first to the last step.
    """
    _, targets, sources = one.layers[layer].shape
    points = np.linspace(0, 1, POINTS)
    courses = []
    for episode in one.by_episode(layer):
        weights = episode.reshape(-1, targets, sources).mean(1)
        time = np.linspace(0, 1, len(weights))
        courses.append([np.interp(points, time, weights[:, source]) for source in range(sources)])
    return np.mean(courses, 0).T


@drawn
def courses(rollouts: Sequence[Rollouts], path: Path) -> Path:
    """Draw the weight of each module along an episode (`course`), with a line per task.

    Of two modules in a layer, only the first is drawn; the weights sum to 1.
    """
    counts = [layer.shape[2] for layer in rollouts[0].layers]
    shown = [count if count > 2 else 1 for count in counts]
    panels = [(layer, source) for layer, count in enumerate(shown) for source in range(count)]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(2.2 + 3.2 * columns, max(3.4, 0.6 + 2.4 * rows)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (layer, source) in zip(grid, panels, strict=False):
        for task, one in enumerate(rollouts):
            axes.plot(
                np.linspace(0, 1, POINTS),
                course(one, layer)[:, source],
                color=PALETTE[task % len(PALETTE)],
                linestyle=STYLES[task // len(PALETTE) % len(STYLES)],
                label=name_of(one.task) if axes is grid[0] else None,
            )
        axes.set_title(f"layer {layer + 1}, module {source + 1}", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("part of the episode, mean over episodes", fontsize="small")
    figure.supylabel("weight of the module", fontsize="small")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return save(figure, path)


# --- tasks beside one another ---------------------------------------------------------------------


def similarity(rollouts: Sequence[Rollouts]) -> NDArray[np.float64]:
    """Compute the similarity of the tasks' mean routing, `[task, task]` in [0, 1].

    It is 1 minus the total variation distance, mean over targets and layers: 1 for equal routing,
    0 if no source is shared.
    """
    means = [one.means() for one in rollouts]
    return np.array([[1.0 - _distance(a, b) for b in means] for a in means])


def _distance(ours: Sequence[Layer], theirs: Sequence[Layer]) -> float:
    """Compute the total variation distance of two tasks, mean over targets and layers."""
    per_target = [0.5 * np.abs(a - b).sum(-1) for a, b in zip(ours, theirs, strict=True)]
    return float(np.concatenate(per_target).mean())


@drawn
def similarity_figure(rollouts: Sequence[Rollouts], path: Path) -> Path:
    """Draw the similarity of the tasks' routing."""
    names = [name_of(one.task) for one in rollouts]
    values = similarity(rollouts)
    low = float(np.floor(values.min() * 20) / 20)
    return matrix(values, names, names, "similarity of routing", path, low, 1.0, "viridis")


@drawn
def task_map(rollouts: Sequence[Rollouts], path: Path, seed: int = 0) -> Path:
    """Draw a t-SNE map of the routing probabilities, as in Yang et al. 2020.

    Each dot is a state, colored by its task. Tasks beyond the palette have other markers with a
    dark edge.
    """
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    chosen = [
        one.vectors()[np.sort(rng.permutation(len(one.layers[0]))[:STATES])] for one in rollouts
    ]
    states = np.concatenate(chosen)
    perplexity = min(30.0, (len(states) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(states)
    figure, axes = sheet(7.0, 5.0)
    begin = 0
    for task, (one, vectors) in enumerate(zip(rollouts, chosen, strict=True)):
        part = plane[begin : begin + len(vectors)]
        begin += len(vectors)
        color = PALETTE[task % len(PALETTE)]
        turn = task // len(PALETTE)
        marker = MARKERS[turn % len(MARKERS)]
        axes.plot(
            part[:, 0],
            part[:, 1],
            marker,
            color=color,
            markersize=4.0 if turn else 3.5,
            markeredgecolor="black" if turn else color,
            markeredgewidth=0.4,
            alpha=0.8,
            label=name_of(one.task),
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE of routing probabilities; distances between far groups mean nothing")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small", markerscale=1.8)
    return save(figure, path)
