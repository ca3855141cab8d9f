"""The page of a report: tables, figures and what must be said about them, as one HTML file beside
its pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softmod.report.runs import PROTOCOL, Comparison, Group
from softmod.report.tables import Table

LONG = 30  # rows beyond which a table is folded


class Page:
    """Text, tables and pictures in the order in which they are added; `page.html` lays them out."""

    def __init__(self, title: str, folder: Path) -> None:
        self.folder = folder
        self.title = title
        self._parts: list[tuple[str, Any, str]] = []  # kind, content, text

    def heading(self, text: str) -> None:
        self._parts.append(("heading", None, text))

    def text(self, text: str) -> None:
        self._parts.append(("text", None, text))

    def note(self, text: str) -> None:
        """Add what a reader must not miss."""
        self._parts.append(("note", None, text))

    def table(self, table: Table) -> None:
        """Add a table, and links to its files; a long one is folded."""
        table.write(self.folder)
        self._parts.append(("table", table, ""))

    def picture(self, path: Path | None, text: str) -> None:
        """Add a picture of the page's folder; nothing where there is none."""
        if path is not None:
            self._parts.append(("picture", path.name, text))

    def link(self, path: Path, text: str) -> None:
        """Add a link to another page below this one."""
        self._parts.append(("link", path.relative_to(self.folder).as_posix(), text))

    def write(self) -> Path:
        """Write the page; return its path."""
        layouts = Environment(
            loader=PackageLoader("softmod", "report"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        path = self.folder / "report.html"
        layout = layouts.get_template("page.html")
        path.write_text(layout.render(title=self.title, parts=self._parts, long=LONG))
        return path


def protocol_line(comparison: Comparison) -> str:
    """Return a sentence on what all runs of a comparison have in common."""
    words = []
    for key, name in PROTOCOL.items():
        value = comparison.protocol[key]
        shown = ", ".join(value) if isinstance(value, tuple) and len(value) <= 10 else value
        shown = f"{len(value)} of them" if isinstance(value, tuple) and len(value) > 10 else shown
        words.append(f"{name}: {shown}")
    return "; ".join(words) + "."


def budget_line(comparison: Comparison) -> str:
    """Return a sentence on how long the runs trained."""
    steps = {
        int(run.curve()[-1][0]) for group in comparison.groups for run in group.runs if run.curve()
    }
    if len(steps) == 1:
        return f"Every run trained {steps.pop():,} environment steps."
    return (
        f"Runs trained between {min(steps):,} and {max(steps):,} environment steps: not an equal"
        " budget in steps."
    )


def unequal_line(group: Group) -> str | None:
    """Say that a model's seeds did not train equally long; None where they did, to a twentieth."""
    steps = sorted(int(run.curve()[-1][0]) for run in group.runs if run.curve())
    if not steps or steps[-1] <= 1.05 * steps[0]:
        return None
    return (
        f"{group.label}: its seeds trained between {steps[0]:,} and {steps[-1]:,} environment"
        " steps."
    )


def machines_line(comparison: Comparison) -> str | None:
    """Say that the runs were not made alike, so that their times do not compare; None where
    they were.
    """
    places = [run.where for group in comparison.groups for run in group.runs]
    told = []
    for key in sorted({key for place in places for key in place}):
        values = sorted({place.get(key, "not told") for place in places})
        if len(values) > 1:
            told.append(f"{key} ({', '.join(values)})")
    return (
        f"Times and rates do not compare: the runs differ in {'; '.join(told)}." if told else None
    )
