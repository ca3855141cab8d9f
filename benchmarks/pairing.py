"""Paired measurements: contenders take turns, and their rates are compared within each turn.

On a noisy machine this affects all contenders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Rate = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """Rates of a contender, one per turn."""

    name: str
    unit: str
    rates: list[float]
    note: str = ""

    @property
    def median(self) -> float:
        """Return the median rate."""
        return median(self.rates)

    def ratio(self, other: Figure) -> tuple[float, float, float]:
        """Return the ratio to another figure's rates within a turn: median, minimum, maximum."""
        ratios = [mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)]
        return median(ratios), min(ratios), max(ratios)


def alternate(
    contenders: Mapping[str, Rate], unit: str, turns: int, notes: Mapping[str, str] | None = None
) -> list[Figure]:
    """Measure each contender once per turn; the first turn is a warm-up and is dropped."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, measure in contenders.items():
            rate = measure()
            if turn:
                rates[name].append(rate)
    return [
        Figure(name, unit, values, (notes or {}).get(name, "")) for name, values in rates.items()
    ]
