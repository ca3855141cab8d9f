"""The terminal: a live line while there is one, a line per evaluation where there is none, a table
at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from softmod.clock import Clock
from softmod.spec import TaskScore, mean_success


class Terminal(Console):
    """A console whose end ends nothing else: where its pipe or terminal is gone, or its disk full,
    it falls silent.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Within this, what cannot be shown is not."""
        try:
            yield
        except OSError:
            self.quiet = True


class Board:
    """Show live lines, one below the other, while it is entered; nowhere without
    a terminal.
    """

    def __init__(self, console: Terminal | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        self.bar: Bar | None = None

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.bar = Bar(*_columns(), console=self.console, transient=True)
            with self.console.tolerated():
                self.bar.start()
            if self.console.quiet:
                self.bar = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with self.console.tolerated():
                self.bar.stop()


class Progress:
    """Env steps, rates, time left and success so far.

    Args:
        total: environment steps of the run.
        minutes: the run's limit by the clock, if it has one.
        board: where its line stands among those of other runs, with its `name`; None: one of its
            own.
    """

    def __init__(
        self,
        total: int,
        minutes: float | None = None,
        console: Terminal | None = None,
        board: Board | None = None,
        name: str = "",
    ) -> None:
        self.board = board or Board(console)
        self.own = board is None
        self.name = "" if board is None else name
        self.console = self.board.console
        self.total = total
        self.minutes = minutes
        self.bar: Bar | None = None
        self.task: Any = None
        self.success = "-"

    def __enter__(self) -> Progress:
        if self.own:
            self.board.__enter__()
        self.bar = self.board.bar
        if self.bar is not None:
            self.task = self.bar.add_task(
                self.name,
                total=self.total,
                steps="",
                rate="-",
                updates="-",
                success=self.success,
                learning="-",
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.own:
            self.board.__exit__()
        elif self.bar is not None:
            self.bar.remove_task(self.task)

    def say(self, line: str) -> None:
        """A line that stays."""
        with self.console.tolerated():
            self.console.print(
                f"{self.name}: {line}" if self.name else line, highlight=False, soft_wrap=True
            )

    def show(
        self,
        clock: Clock,
        env_steps_per_second: float,
        updates_per_second: float,
        learning: float | None = None,
    ) -> None:
        """Bring the bar up to date; `learning` is the mean success rate of the last training
        episodes.
        """
        if self.bar is None:
            return
        done = clock.env_steps
        if self.minutes is not None:  # whichever end is nearer
            done = max(done, int(self.total * min(1.0, clock.seconds / (60.0 * self.minutes))))
        with self.console.tolerated():
            self.bar.update(
                self.task,
                completed=done,
                steps=f"{clock.env_steps:,}/{self.total:,}",
                rate=f"{env_steps_per_second:,.0f}",
                updates=f"{updates_per_second:,.0f}",
                success=self.success,
                learning="-" if learning is None else f"{learning:.2f}",
            )

    def evaluation(self, clock: Clock, scores: list[TaskScore]) -> None:
        """An evaluation in one line."""
        mean = mean_success(scores)
        self.success = f"{mean:.2f}"
        shown = [f"{score.task} {score.success_rate:.2f}" for score in scores[:10]]
        more = f" ... {len(scores) - 10} more" if len(scores) > 10 else ""
        at = f"{clock.env_steps:>12,} env steps, {clock.seconds / 60:5.1f} min"
        self.say(f"{at}: success {mean:.3f}  ({', '.join(shown)}{more})")


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]} env steps"),
        TextColumn("{task.fields[rate]} steps/s"),
        TextColumn("{task.fields[updates]} updates/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("success {task.fields[success]}, in training {task.fields[learning]}"),
    ]


def table(scores: list[TaskScore]) -> Table:
    """Success rate and return per task, and their mean."""
    result = Table()
    for heading in ("task", "success", "return", "episodes"):
        result.add_column(heading, justify="left" if heading == "task" else "right")
    for score in scores:
        result.add_row(
            score.task,
            f"{score.success_rate:.3f}",
            f"{score.episode_return:.1f}",
            str(score.episodes),
        )
    result.add_section()
    count = len(scores)
    success = mean_success(scores)
    returned = sum(score.episode_return for score in scores) / count
    result.add_row(
        "mean", f"{success:.3f}", f"{returned:.1f}", str(sum(score.episodes for score in scores))
    )
    return result


def print_table(scores: list[TaskScore], title: str) -> None:
    """On stdout, wide enough for the longest task name even when it is no terminal."""
    console = (
        Terminal(file=sys.stdout) if sys.stdout.isatty() else Terminal(file=sys.stdout, width=100)
    )
    with console.tolerated():
        console.print(title, highlight=False, soft_wrap=True)
        console.print(table(scores))


def print_means(means: Mapping[int, float]) -> None:
    """Print the mean success of each seed, and of all of them, on stdout."""
    console = Terminal(file=sys.stdout)
    each = ", ".join(f"{seed}: {mean:.3f}" for seed, mean in means.items())
    with console.tolerated():
        overall = sum(means.values()) / len(means)
        console.print(
            f"success by seed: {each}; mean {overall:.3f}", highlight=False, soft_wrap=True
        )
