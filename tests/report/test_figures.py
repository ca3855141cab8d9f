"""How methods look in figures, and how tables tell what a single seed cannot."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from softmod.report.figures import LOOKS, METHODS, looks
from softmod.report.page import LONG, Page
from softmod.report.runs import Group
from softmod.report.statistics import improvement, interval, iqm
from softmod.report.tables import Table, shown


def groups(*labels: str) -> list[Group]:
    return [Group(label, label.split()[0], []) for label in labels]


def test_a_known_method_looks_the_same_everywhere():
    alone, among = looks(groups("mt_sac")), looks(groups(*reversed(METHODS)))
    assert alone["mt_sac"] == among["mt_sac"] == LOOKS[METHODS.index("mt_sac")]
    assert len(set(among.values())) == len(METHODS)


def test_up_to_seven_have_a_colour_each_whatever_they_are():
    labels = [f"{name} task_weights={how}" for name in ("mt_mh_sac_small", "soft_modular_small") for how in "abc"]
    made = looks(groups(*labels, "a method of one's own"))
    assert len({color for color, _, _ in made.values()}) == 7


def test_more_than_there_are_looks_for_are_drawn_all_the_same():
    assert len(looks(groups(*(f"own_{number}" for number in range(30))))) == 30


@pytest.mark.parametrize(
    "found", [interval(iqm, np.array([[0.2, 0.6]])), improvement(np.ones((1, 2)), np.zeros((1, 2)))]
)
def test_a_single_seed_has_no_interval(found):
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert shown(found) == f"{found.value:.3f}"
    lines = Table("t", "", ["method", "success"], [["ours", found]]).as_csv().splitlines()
    assert lines[1].endswith(f"{found.value},,")


@pytest.mark.parametrize("rows", [LONG, LONG + 1])
def test_a_long_table_is_folded(rows: int, tmp_path: Path):
    page = Page("title", tmp_path)
    page.table(Table("t", "caption", ["a", "b"], [["x", 1]] * rows))
    assert ("<details>" in page.write().read_text()) == (rows > LONG)
