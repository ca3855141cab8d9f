"""Success of tasks with other routing: of another task, frozen at its mean, or uniform.

The task enters a soft modular policy by the router only. So a task with the routing of another task
is the policy acting on one task's observations with the other task's index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.episode import EvalEpisode
from softmod.errors import ConfigError
from softmod.networks.soft_modular import Router, SoftModular
from softmod.report.figures import matrix, name_of
from softmod.report.routing import Layer, Rollouts
from softmod.report.tables import Cell, Table
from softmod.spec import Floats
from softmod.system.drawing import drawn

Act = Callable[[Floats], Floats]  # from an observation to an action


def success_rate(policy: TrainedPolicy, task: int, act: Act, episodes: int) -> float:
    """Play the first goals of a task with some behavior; return its success rate."""
    suite = policy.suite
    goals = suite.goals(task)[:episodes]
    env = suite.make(task)
    successes = 0
    try:
        for goal in goals:
            episode = EvalEpisode(env, goal, suite.spec.horizon)
            while not episode.over:
                episode.step(act(episode.obs))
            successes += episode.success
    finally:
        env.close()
    return successes / len(goals)


def swapped(policy: TrainedPolicy, episodes: int) -> NDArray[np.float64]:
    """Compute success `[task, task]` of the row's task with the routing of the column's."""
    count = len(policy.tasks)
    values = np.empty((count, count))
    for task, other in np.ndindex(count, count):
        values[task, other] = success_rate(policy, task, _acting_as(policy, other), episodes)
    return values


def _acting_as(policy: TrainedPolicy, task: int) -> Act:
    return lambda obs: policy.act(obs, task)


def router_of(policy: TrainedPolicy) -> Router:
    """Return a policy's router.

    Raises:
        ConfigError: The network is not a soft modular one.
    """
    network = policy.actor.network
    if not isinstance(network, SoftModular):
        raise ConfigError(
            f"swap=true: for soft modular networks only; this one is {type(network).__name__}"
        )
    return network.router


@contextmanager
def fixed(router: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Replace the probabilities that a router returns by constant ones.

    Args:
        router: Router module, which returns `[1, row, target, source]` per layer.
        layers: Probabilities `[target, source]` per layer.
    """
    constants = [torch.as_tensor(layer, dtype=torch.float32) for layer in layers]

    def replaced(module: nn.Module, inputs: Any, routes: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            constant.to(route).expand_as(route)
            for constant, route in zip(constants, routes, strict=True)
        ]

    handle = router.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def frozen(policy: TrainedPolicy, rollouts: Sequence[Rollouts], episodes: int) -> Table:
    """Tabulate success with routing as learned, frozen at the task's mean, and uniform."""
    router = router_of(policy)
    rows: list[list[Cell]] = []
    for task, one in enumerate(rollouts):
        act = _acting_as(policy, task)
        means = one.means()
        row: list[Cell] = [name_of(one.task), success_rate(policy, task, act, episodes)]
        for layers in (means, [np.full_like(mean, 1 / mean.shape[-1]) for mean in means]):
            with fixed(router, layers):
                row.append(success_rate(policy, task, act, episodes))
        rows.append(row)
    averages = np.array([row[1:] for row in rows], np.float64).mean(0).tolist()
    return Table(
        "frozen",
        "Success with routing as learned, with the mean routing of the task in all states, and with"
        " uniform routing",
        ["task", "as learned", "mean of the task", "uniform"],
        [*rows, ["mean", *averages]],
    )


def swaps_table(tasks: Sequence[str], values: NDArray[np.float64]) -> Table:
    """Tabulate success `[task, task]` (`swapped`), a column per routing."""
    names = [name_of(task) for task in tasks]
    rows: list[list[Cell]] = [
        [name, *row] for name, row in zip(names, values.tolist(), strict=True)
    ]
    caption = "Success of the row's task with the routing of the column's task"
    return Table("swaps", caption, ["task", *names], rows)


def agreement(similarities: NDArray[np.float64], successes: NDArray[np.float64]) -> float:
    """Compute Spearman's rank correlation of two matrices `[task, task]` off the diagonal.

    It is NaN if one of them is constant there.
    """
    others = ~np.eye(len(successes), dtype=bool)
    if np.ptp(similarities[others]) == 0 or np.ptp(successes[others]) == 0:
        return float("nan")
    return float(spearmanr(similarities[others], successes[others]).statistic)


@drawn
def swaps_figure(tasks: Sequence[str], values: NDArray[np.float64], path: Path) -> Path:
    """Draw success `[task, task]` (`swapped`)."""
    names = [name_of(task) for task in tasks]
    title = "success of the row's task\nwith the routing of the column's task"
    return matrix(values, names, names, title, path, 0.0, 1.0, "viridis")
