"""Success with other routing: constant routing in the network, and the routing of other tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from softmod.checkpoint.load import TrainedPolicy
from softmod.envs.toy import TOY_TASKS, Toy
from softmod.errors import ConfigError
from softmod.networks.build import build_actor
from softmod.report import swaps
from softmod.report.__main__ import run
from softmod.report.routing import roll_out
from softmod.train import run as train
from tests.command.test_train import SMALL, here
from tests.settings import network

__all__ = ["here"]


@pytest.fixture
def policy() -> TrainedPolicy:
    """Make an untrained soft modular policy for the toy tasks."""
    suite = Toy(TOY_TASKS, horizon=10)
    node = {"_target_": "softmod.networks.soft_modular.SoftModular"} | network(
        "soft_modular", init="torch", module_width=8, embedding_width=8, gating_width=8
    )
    return TrainedPolicy(build_actor(node, "clamp", False, suite.spec), suite)


def test_constant_routing_replaces_that_of_the_router_and_only_for_a_while(policy: TrainedPolicy):
    obs = policy.suite.make(0).reset(policy.suite.goals(0)[0])
    router = swaps.router_of(policy)
    learned = policy.act(obs, 0)
    own = [np.asarray(layer, np.float64) for layer in policy.routing(obs, 0)]
    uniform = [np.full_like(layer, 1 / layer.shape[-1]) for layer in own]
    assert not np.array_equal(policy.act(obs, 1), learned)
    with swaps.fixed(router, own):
        np.testing.assert_allclose(policy.act(obs, 0), learned, atol=1e-6)
        np.testing.assert_allclose(policy.act(obs, 1), learned, atol=1e-6)  # by the router only
    with swaps.fixed(router, uniform):
        other = policy.act(obs, 0)
        assert all((layer == 0.5).all() for layer in policy.routing(obs, 0))
    assert not np.allclose(other, learned, atol=1e-6)
    np.testing.assert_array_equal(policy.act(obs, 0), learned)


class Env:
    """Environment that is solved by a positive action."""

    def reset(self, goal: Any) -> np.ndarray:
        return np.zeros(1)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool]:
        return np.zeros(1), 0.0, action > 0

    def close(self) -> None:
        pass


def test_a_row_is_a_task_and_a_column_the_task_whose_routing_it_gets():
    suite = SimpleNamespace(
        make=lambda task: Env(),
        goals=lambda task: np.zeros((5, 1)),
        spec=SimpleNamespace(horizon=3),
    )
    policy: Any = SimpleNamespace(
        tasks=["a-v3", "b-v3"], suite=suite, act=lambda obs, task: 1.0 if task == 1 else -1.0
    )
    values = swaps.swapped(policy, episodes=2)
    assert values.tolist() == [[0, 1], [0, 1]]
    table = swaps.swaps_table(policy.tasks, values)
    assert table.columns == ["task", "a", "b"]
    assert table.rows == [["a", 0.0, 1.0], ["b", 0.0, 1.0]]


def test_a_task_is_played_with_learned_mean_and_uniform_routing(policy: TrainedPolicy, monkeypatch):
    seen: list[float] = []

    def played(policy: TrainedPolicy, task: int, act: swaps.Act, episodes: int) -> float:
        obs = policy.suite.make(task).reset(policy.suite.goals(task)[0])
        seen.append(float(policy.routing(obs, task)[0][0, 0]))
        return len(seen) / 10

    monkeypatch.setattr(swaps, "success_rate", played)
    rollouts = roll_out(policy, 1)
    table = swaps.frozen(policy, rollouts, 1)
    assert table.rows[0][1:] == [0.1, 0.2, 0.3]
    assert table.rows[-1][0] == "mean"
    for task, one in enumerate(rollouts):
        _, mean, uniform = seen[3 * task : 3 * task + 3]
        assert mean == pytest.approx(one.means()[0][0, 0], abs=1e-6)
        assert uniform == 0.5


def test_agreement_leaves_out_the_tasks_own_routing():
    similarities = np.array([[1, 0.1, 0.2], [0.3, 1, 0.4], [0.5, 0.6, 1]])
    successes = similarities / 2
    np.fill_diagonal(successes, 0)
    assert swaps.agreement(similarities, successes) == pytest.approx(1)
    assert swaps.agreement(similarities, -successes) == pytest.approx(-1)
    assert np.isnan(swaps.agreement(similarities, np.eye(3)))


def test_another_network_has_no_router_to_replace():
    policy: Any = SimpleNamespace(actor=SimpleNamespace(network=object()))
    with pytest.raises(ConfigError, match="swap=true: for soft modular networks only"):
        swaps.router_of(policy)


def test_the_report_of_a_policy_has_all_tables_and_pictures(here: Path):
    assert train([*SMALL, "fabric.compile=eager"]) == 0
    (folder,) = here.glob("runs/*/seed_0")
    assert run([f"checkpoint={folder}", "episodes=2", "swap=true"]) == 0
    written = {path.name for path in (here / "report").iterdir()}
    pictures = {"graphs.png", "similarity.png", "map.png", "courses.png", "swaps.png"}
    assert pictures <= written
    for name in ("sources", "variation", "distances", "frozen", "swaps"):
        assert {f"{name}.csv", f"{name}.md"} <= written
    page = (here / "report" / "report.html").read_text()
    assert all(picture in page for picture in pictures)
