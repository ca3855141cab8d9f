"""HTML page of a report: tables, figures and notes, with the pictures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softmod.report.runs import PROTOCOL, Comparison, Group
from softmod.report.tables import Table

LONG = 30  # rows beyond which a table is folded


class Page:
    """Text, tables and pictures in the order of their addition; the layout is `page.html`."""

    def __init__(self, title: str, folder: Path) -> None:
        self.folder = folder
        self.title = title
        self._parts: list[tuple[str, Any, str]] = []  # kind, content, text

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._parts.append(("heading", None, text))

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(("text", None, text))

    def note(self, text: str) -> None:
        """Add a highlighted paragraph."""
        self._parts.append(("note", None, text))

    def table(self, table: Table) -> None:
        """Write a table's files and add it with links to them; a long table is folded."""
        table.write(self.folder)
        self._parts.append(("table", table, ""))

    def picture(self, path: Path | None, text: str) -> None:
        """Add a picture from the page's folder; do nothing if `path` is None."""
        if path is not None:
            self._parts.append(("picture", path.name, text))

    def link(self, path: Path, text: str) -> None:
        """Add a link to a file below the page's folder."""
        self._parts.append(("link", path.relative_to(self.folder).as_posix(), text))

    def write(self) -> Path:
        """Write the page; return its path."""
        layouts = Environment(
            loader=PackageLoader("softmod", "report"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        path = self.folder / "report.html"
        layout = layouts.get_template("page.html")
        path.write_text(
            layout.render(title=self.title, parts=self._parts, long=LONG), encoding="utf-8"
        )
        return path


def protocol_line(comparison: Comparison) -> str:
    """Return a sentence with the protocol that all runs of a comparison share."""
    words = []
    for key, name in PROTOCOL.items():
        value = comparison.protocol[key]
        if isinstance(value, tuple):
            value = ", ".join(value) if len(value) <= 10 else f"{len(value)} of them"
        words.append(f"{name}: {value}")
    return "; ".join(words) + "."


def budget_line(comparison: Comparison) -> str:
    """Return a sentence with the environment steps of the runs."""
    steps = {
        int(run.curve()[-1][0]) for group in comparison.groups for run in group.runs if run.curve()
    }
    if len(steps) == 1:
        return f"Every run trained for {steps.pop():,} environment steps."
    return (
        f"Runs trained for {min(steps):,} to {max(steps):,} environment steps: their budgets are"
        " not equal."
    )


def unequal_line(group: Group) -> str | None:
    """Return a note if the env steps of a model's seeds differ by more than 5 %, else None."""
    steps = sorted(int(run.curve()[-1][0]) for run in group.runs if run.curve())
    if not steps or steps[-1] <= 1.05 * steps[0]:
        return None
    return f"{group.label}: its seeds trained for {steps[0]:,} to {steps[-1]:,} environment steps."


def machines_line(comparison: Comparison) -> str | None:
    """Return a note if the runs' machines or settings make their times incomparable, else None."""
    machines = [run.machine for group in comparison.groups for run in group.runs]
    differences = []
    for key in sorted({key for machine in machines for key in machine}):
        values = sorted({machine.get(key, "not recorded") for machine in machines})
        if len(values) > 1:
            differences.append(f"{key} ({', '.join(values)})")
    if not differences:
        return None
    return f"Times and rates are not comparable: the runs differ in {'; '.join(differences)}."
