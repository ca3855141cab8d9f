"""Numbers on routing: effective sources, and its variation within and between tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from softmod.report.figures import name_of
from softmod.report.routing import Layer, Rollouts
from softmod.report.tables import Cell, Table

STATES = 200  # of each task for distances, at most


def effective_sources(layer: Layer) -> float:
    """Return the effective number of sources that a target reads: 1 to the number of sources.

    It is the exponential of the entropy, which is averaged over states and targets.

    Args:
        layer: Probabilities `[step, target, source]`.
    """
    logs = np.log(np.where(layer > 0, layer, 1.0))
    return float(np.exp(-(layer * logs).sum(-1).mean()))


def sources_table(rollouts: Sequence[Rollouts]) -> Table:
    """Tabulate the effective number of sources per task and routing layer.

    A layer has two columns: of single states, and of the mean over states.
    """
    count = len(rollouts[0].layers)
    columns = ["task"]
    for number in range(1, count + 1):
        columns += [f"layer {number}, states", f"layer {number}, mean"]
    rows: list[list[Cell]] = []
    for one in rollouts:
        row: list[Cell] = [name_of(one.task)]
        for layer in one.layers:
            row += [effective_sources(layer), effective_sources(layer.mean(0, keepdims=True))]
        rows.append(row)
    averages = np.array([row[1:] for row in rows], np.float64).mean(0).tolist()
    caption = (
        "Effective number of sources per target (exponential of the entropy), of single states and"
        " of the mean routing"
    )
    return Table("sources", caption, columns, [*rows, ["mean", *averages]])


# --- variation ------------------------------------------------------------------------------------


def variation(rollouts: Sequence[Rollouts], layer: int) -> tuple[float, float, float]:
    """Decompose the variance of a layer's probabilities, summed over connections.

    States have equal weights within an episode, episodes within a task, and tasks.

    Returns:
        Shares of the variance between tasks, between episodes of a task, and within an episode;
        NaN if routing is constant.
    """
    within = 0.0
    between_episodes = 0.0
    task_means = []
    for one in rollouts:
        episodes = one.by_episode(layer)
        means = np.stack([episode.mean(0) for episode in episodes])
        within += np.mean([episode.var(0).sum() for episode in episodes]) / len(rollouts)
        between_episodes += means.var(0).sum() / len(rollouts)
        task_means.append(means.mean(0))
    parts = np.array([np.stack(task_means).var(0).sum(), between_episodes, within])
    total = parts.sum()
    between, episodes_share, within_share = parts / total if total > 0 else np.full(3, np.nan)
    return float(between), float(episodes_share), float(within_share)


def variation_table(rollouts: Sequence[Rollouts]) -> Table:
    """Tabulate the shares of the variance of routing (`variation`) per routing layer."""
    rows: list[list[Cell]] = [
        [f"layer {layer + 1}", *variation(rollouts, layer)]
        for layer in range(len(rollouts[0].layers))
    ]
    columns = ["routing", "between tasks", "between episodes of a task", "within an episode"]
    return Table("variation", "Shares of the variance of the routing probabilities", columns, rows)


def distances(rollouts: Sequence[Rollouts], seed: int = 0) -> NDArray[np.float64]:
    """Compute the mean distance of a state of one task to a state of another.

    The distance of two states is the total variation distance of their routing, mean over targets
    and layers: 0 for equal routing, 1 if no source is shared.

    Returns:
        `[task, task]`; the diagonal is the mean over pairs of different states of a task.
    """
    rng = np.random.default_rng(seed)
    targets = sum(layer.shape[1] for layer in rollouts[0].layers)
    chosen = [one.vectors()[rng.permutation(len(one.layers[0]))[:STATES]] for one in rollouts]
    values = np.empty((len(rollouts), len(rollouts)))
    for row, column in np.ndindex(*values.shape):
        pairs = 0.5 / targets * cdist(chosen[row], chosen[column], "cityblock")
        count = len(pairs) * (len(pairs) - 1) if row == column else pairs.size
        values[row, column] = pairs.sum() / max(1, count)
    return values


def distances_table(rollouts: Sequence[Rollouts]) -> Table:
    """Tabulate distances of states (`distances`) within each task and to the other tasks."""
    values = distances(rollouts)
    names = [name_of(one.task) for one in rollouts]
    rows: list[list[Cell]] = []
    for index, name in enumerate(names):
        others = np.delete(values[index], index)
        nearest = int(others.argmin())
        other = [*names[:index], *names[index + 1 :]][nearest]
        rows.append(
            [name, values[index, index], float(others[nearest]), other, float(others.mean())]
        )
    averages = [float(np.mean([row[column] for row in rows])) for column in (1, 2, 4)]
    rows.append(["mean", *averages[:2], "", averages[2]])
    columns = ["task", "own states", "nearest task's states", "nearest task", "other tasks' states"]
    caption = (
        "Total variation distance of the routing of a task's states to that of other states, mean"
        " over pairs"
    )
    return Table("distances", caption, columns, rows)
