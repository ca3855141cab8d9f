"""Looks of models in figures, layout of figures, and tables of a single seed."""

from __future__ import annotations

import math
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
from matplotlib.figure import Figure

from softmod.config.groups import options
from softmod.report import figures
from softmod.report.figures import LOOKS, MODELS, looks, running_mean
from softmod.report.intervals import improvement, interval, iqm
from softmod.report.page import LONG, Page
from softmod.report.runs import Comparison, Group, comparisons
from softmod.report.tables import Table, shown
from softmod.tracking.names import routing_entropy
from tests.report.test_runs import run


def groups(*labels: str) -> list[Group]:
    """Make empty groups whose model is the first word of the label."""
    return [Group(label, label.split()[0], []) for label in labels]


def test_a_model_looks_the_same_everywhere():
    every = options("model")
    among = looks(groups(*reversed(every)))
    assert len(set(among.values())) == len(every) == len(MODELS)
    for name in every:
        assert looks(groups(name, f"a {name}"))[name] == among[name] == LOOKS[MODELS.index(name)]


def test_up_to_seven_groups_have_a_color_each():
    labels = [
        f"{name} task_weights={how}"
        for name in ("mt_mh_sac_small", "soft_modular_small")
        for how in "abc"
    ]
    made = looks(groups(*labels, "a model of one's own"))
    assert len({color for color, _, _ in made.values()}) == 7


def test_more_groups_than_looks_are_drawn():
    assert len(looks(groups(*(f"own_{number}" for number in range(30))))) == 30


@pytest.mark.parametrize(
    "found", [interval(iqm, np.array([[0.2, 0.6]])), improvement(np.ones((1, 2)), np.zeros((1, 2)))]
)
def test_a_single_seed_has_no_interval(found):
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert shown(found) == f"{found.value:.3f}"
    lines = Table("t", "", ["model", "success"], [["ours", found]]).as_csv().splitlines()
    assert lines[1].endswith(f"{found.value},,")


@pytest.mark.parametrize("rows", [LONG, LONG + 1])
def test_a_long_table_is_folded(rows: int, tmp_path: Path):
    page = Page("title", tmp_path)
    page.table(Table("t", "caption", ["a", "b"], [["x", 1]] * rows))
    assert ("<details>" in page.write().read_text()) == (rows > LONG)


# --- nothing is cut off ---------------------------------------------------------------------------


# as long as shipped sweeps make them
SHIPPED = "soft_modular_small state_in_routing=False task_weights=released"
SEARCHED = (
    "soft_modular_small num_modules=4 optimizer.actor.lr=0.00023746273847263 discount=0.98123456789"
)
UNBROKEN = "a_model_of_ones_own_" * 6


def comparison(name: str, count: int) -> Comparison:
    """Make two seeds each of models with such names, with routing entropies of four layers."""
    runs = [
        run(model=f"{name}_{letter}", seed=seed, actor__width=width)
        for width, letter in enumerate(ascii_letters[:count])
        for seed in (0, 1)
    ]
    for one in runs:
        for layer in (1, 2, 3, 4):
            one.values[f"routing/entropy/layer_{layer}"] = {100: 0.7, 200: 0.1 * layer}
    (found,) = comparisons(runs)
    assert len(found.groups) == count
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Record the name of every figure, and by how many inches it exceeds its edges."""
    exceeded: list[tuple[str, float]] = []

    def look(figure: Figure, path: Path) -> Path:
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        exceeded.append((path.stem, max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)))
        return path

    monkeypatch.setattr(figures, "save", look)
    return exceeded


@pytest.mark.parametrize(
    ("name", "count"), [("a", 1), (SHIPPED, 2), (SHIPPED, 8), (SEARCHED, 20), (UNBROKEN, 2)]
)
def test_nothing_is_cut_off(name: str, count: int, drawn, tmp_path: Path):
    found = comparison(name, count)
    figures.intervals(found, tmp_path / "intervals.png")
    figures.heat_map(found, tmp_path / "heat_map.png")
    figures.improvement_matrix(found, tmp_path / "improvement.png")
    figures.learning_curves(found, tmp_path / "curves.png")
    for count in (1, 2, 4):
        names = {routing_entropy(layer): f"layer {layer}" for layer in range(1, count + 1)}
        assert figures.metric_curves(
            found, lambda _, names=names: names, "entropy", tmp_path / f"entropy_{count}.png"
        )
    figures.capacity(
        found, {g.label: 10**n for n, g in enumerate(found.groups, 3)}, tmp_path / "capacity.png"
    )
    assert len(drawn) == 7 + (len(found.groups) > 1)  # capacity needs sizes that differ
    assert {name: round(beyond, 2) for name, beyond in drawn if beyond > 0.04} == {}


def test_seen_failing_a_label_that_is_longer_than_its_figure(drawn, tmp_path: Path):
    figures.matrix(
        np.ones((2, 2)), "ab", "ab", "a title " * 20, tmp_path / "long.png", 0, 1, "viridis"
    )
    assert drawn[0][1] > 1


def test_a_running_mean():
    assert running_mean(np.full(200, 0.3)) == pytest.approx(np.full(200, 0.3))  # at the ends too
    spike = running_mean(np.eye(1, 200, 100)[0])
    assert spike.sum() == pytest.approx(1)
    assert np.count_nonzero(spike > 1e-9) == 21
    assert running_mean(np.array([2.0])) == pytest.approx([2.0])
    gap = np.where(np.arange(200) == 100, np.nan, 0.3)  # an update that was skipped
    assert running_mean(gap) == pytest.approx(np.full(200, 0.3))
