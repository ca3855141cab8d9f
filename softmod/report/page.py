"""The page of a report: tables, figures and what must be said about them, as one HTML file beside
its pictures.
"""

from __future__ import annotations

import html
from pathlib import Path

from softmod.report.runs import PROTOCOL, Comparison, Group
from softmod.report.tables import Table

LONG = 30  # rows of a table
STYLE = """
body { font-family: system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem }
caption { text-align: left; padding: .3rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
.note { background: #fff6dd; padding: .6rem 1rem }
h2 { margin-top: 3rem }
"""


class Page:
    """Text, tables and pictures in the order in which they are added."""

    def __init__(self, title: str, folder: Path) -> None:
        self.folder, self._parts = folder, [f"<h1>{html.escape(title)}</h1>"]
        self.title = title

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """What a reader must not miss."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, table: Table) -> None:
        """A table, and the links to its files; a long one is folded."""
        table.write(self.folder)
        shown = table.as_html()
        if len(table.rows) > LONG:
            shown = (
                f"<details><summary>{html.escape(table.caption)}: {len(table.rows)}"
                f" rows</summary>{shown}</details>"
            )
        self._parts.append(shown)
        links = " · ".join(
            f'<a href="{table.name}.{kind}">{kind.upper()}</a>' for kind in ("csv", "tex")
        )
        self._parts.append(f"<p>{links}</p>")

    def picture(self, path: Path | None, text: str) -> None:
        """A picture of the page's folder; nothing where there is none."""
        if path is not None:
            alt = html.escape(text)
            self._parts.append(
                f'<figure><img src="{path.name}"'
                f' alt="{alt}"><figcaption>{alt}</figcaption></figure>'
            )

    def link(self, path: Path, text: str) -> None:
        """To another page below this one."""
        place = path.relative_to(self.folder).as_posix()
        self._parts.append(f'<p><a href="{html.escape(place)}">{html.escape(text)}</a></p>')

    def write(self) -> Path:
        path = self.folder / "report.html"
        head = (
            "<!doctype html><html lang=en><meta"
            f" charset=utf-8><title>{html.escape(self.title)}</title>"
        )
        path.write_text(f"{head}<style>{STYLE}</style>\n" + "\n".join(self._parts) + "\n</html>\n")
        return path


def protocol_line(comparison: Comparison) -> str:
    """What all runs of a comparison have in common, in a sentence."""
    words = []
    for key, name in PROTOCOL.items():
        value = comparison.protocol[key]
        shown = ", ".join(value) if isinstance(value, tuple) and len(value) <= 10 else value
        shown = f"{len(value)} of them" if isinstance(value, tuple) and len(value) > 10 else shown
        words.append(f"{name}: {shown}")
    return "; ".join(words) + "."


def budget_line(comparison: Comparison) -> str:
    """How long the runs trained; what differs is said."""
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
    """That the seeds of a model did not train equally long; None where they did, to a twentieth."""
    steps = sorted(int(run.curve()[-1][0]) for run in group.runs if run.curve())
    if not steps or steps[-1] <= 1.05 * steps[0]:
        return None
    return (
        f"{group.label}: its seeds trained between {steps[0]:,} and {steps[-1]:,} environment"
        " steps."
    )


def machines_line(comparison: Comparison) -> str | None:
    """That the runs were not made alike, so that their times do not compare; None where
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
