"""Numbers on routing: effective sources, and variation within and between tasks."""

from __future__ import annotations

import numpy as np
import pytest

from softmod.report import sharing
from softmod.report.routing import Rollouts

LEFT = (1.0, 0.0)
RIGHT = (0.0, 1.0)
BOTH = (0.5, 0.5)


def rollouts(task: str, *episodes: list[tuple[float, float]]) -> Rollouts:
    """Make rollouts of a network with one target and two sources; a pair of numbers is a step."""
    steps = np.array([step for episode in episodes for step in episode])[:, None]
    return Rollouts(task, [steps], 1, [len(episode) for episode in episodes])


def test_sources_count_from_one_to_all():
    assert sharing.effective_sources(np.array([[LEFT]])) == pytest.approx(1)
    assert sharing.effective_sources(np.array([[BOTH]])) == pytest.approx(2)
    assert sharing.effective_sources(np.array([[LEFT], [BOTH]])) == pytest.approx(2**0.5)


def test_a_task_that_alternates_reads_both_sources_on_average_only():
    table = sharing.sources_table([rollouts("reach-v3", [LEFT, RIGHT])])
    assert table.columns == ["task", "layer 1, states", "layer 1, mean"]
    assert table.rows == [["reach", 1.0, 2.0], ["mean", 1.0, 2.0]]


@pytest.mark.parametrize(
    ("made", "shares"),
    [
        ([rollouts("a", [LEFT, LEFT]), rollouts("b", [RIGHT])], (1, 0, 0)),
        ([rollouts("a", [LEFT, LEFT], [RIGHT]), rollouts("b", [BOTH])], (0, 1, 0)),
        ([rollouts("a", [LEFT, RIGHT]), rollouts("b", [BOTH])], (0, 0, 1)),
        ([rollouts("a", [LEFT, RIGHT]), rollouts("b", [RIGHT, RIGHT])], (1 / 3, 0, 2 / 3)),
    ],
)
def test_variance_lies_between_tasks_episodes_or_steps(
    made: list[Rollouts], shares: tuple[float, float, float]
):
    assert sharing.variation(made, 0) == pytest.approx(shares)


def test_constant_routing_has_no_shares_of_variance():
    assert np.isnan(sharing.variation([rollouts("a", [LEFT]), rollouts("b", [LEFT])], 0)).all()


def test_distances_are_those_of_different_states():
    made = [rollouts("a", [LEFT, RIGHT]), rollouts("b", [LEFT, LEFT]), rollouts("c", [BOTH])]
    np.testing.assert_allclose(
        sharing.distances(made), [[1, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    )


def test_the_nearest_task_is_another_one():
    made = [rollouts("a", [LEFT]), rollouts("b", [BOTH]), rollouts("c", [RIGHT])]
    rows = sharing.distances_table(made).rows
    assert rows[0] == ["a", 0.0, 0.5, "b", 0.75]
    assert rows[2] == ["c", 0.0, 0.5, "b", 0.75]
    assert rows[3] == ["mean", 0.0, 0.5, "", pytest.approx(2 / 3)]
