"""Terminal output: a live progress line, a line per evaluation, and a table at the end."""

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
from softmod.system.streams import is_terminal
from softmod.tracking.transcript import Transcript


class Terminal(Console):
    """A console that disables its output instead of raising when writing fails.

    That happens when a pipe or terminal is closed, a disk is full, or the stream is an object of
    the caller. Only a terminal gets live displays and colors, whatever FORCE_COLOR says; a notebook
    gets plain lines. Brackets are printed as they are: they occur in names of folders.
    """

    def __init__(self, **options: Any) -> None:
        stream = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
        plain = {"force_jupyter": False, "markup": False, "emoji": False}
        super().__init__(**(plain | {"force_terminal": is_terminal(stream)} | options))

    def on_broken_pipe(self) -> None:
        """Turn quiet; rich would exit the process."""
        self.quiet = True

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Turn quiet if writing fails within this context."""
        try:
            yield
        except Exception:  # no output is worth a run
            self.quiet = True


class Board:
    """A live display of progress lines, shown within its context if there is a terminal.

    Args:
        console: by default stderr.
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
    """Progress of a run: env steps, rates, time left and success so far.

    Args:
        total: env steps of the run.
        minutes: time limit of the run, if it has one.
        console: by default stderr; unused with a board.
        board: display shared with other runs; None: a display of its own.
        name: label of the run on a shared display.
        transcript: file that gets the permanent lines too.
    """

    def __init__(
        self,
        total: int,
        minutes: float | None = None,
        console: Terminal | None = None,
        board: Board | None = None,
        name: str = "",
        transcript: Transcript | None = None,
    ) -> None:
        self.board = board or Board(console)
        self.own = board is None
        self.name = "" if board is None else name
        self.transcript = transcript
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
        """Print a permanent line, labelled with the run's name on a shared display."""
        if self.transcript is not None:
            self.transcript.line(line)
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
        """Update the progress line.

        Args:
            clock: the run's clock.
            env_steps_per_second: since metrics were last written.
            updates_per_second: since metrics were last written.
            learning: mean success rate of recent training episodes; None if there are none.
        """
        if self.bar is None:
            return
        done = clock.env_steps
        if self.minutes is not None:  # show whichever limit is nearer
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
        """Print an evaluation in one line."""
        mean = mean_success(scores)
        self.success = f"{mean:.2f}"
        shown = [f"{score.task} {score.success_rate:.2f}" for score in scores[:10]]
        more = f" ... {len(scores) - 10} more" if len(scores) > 10 else ""
        at = f"{clock.env_steps:>12,} env steps, {clock.seconds / 60:5.1f} min"
        self.say(f"{at}: success {mean:.3f}  ({', '.join(shown)}{more})")


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]} env steps"),
        TextColumn("{task.fields[rate]} steps/s"),
        TextColumn("{task.fields[updates]} updates/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("success {task.fields[success]}, in training {task.fields[learning]}"),
    ]


def table(scores: list[TaskScore]) -> Table:
    """Return a table of success rate, return and episodes per task, with the mean."""
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


def print_table(scores: list[TaskScore], title: str, transcript: Transcript | None = None) -> None:
    """Print the table of scores on stdout, and into a run's transcript.

    It is 100 columns wide if it is not for a terminal.
    """
    consoles = [Terminal() if is_terminal(sys.stdout) else Terminal(width=100)]
    if transcript is not None:
        consoles.append(Terminal(file=transcript, width=100))
    for console in consoles:
        with console.tolerated():
            console.print(title, highlight=False, soft_wrap=True)
            console.print(table(scores))


def print_means(means: Mapping[int, float]) -> None:
    """Print the mean success rate of each seed, and the mean over seeds, on stdout."""
    console = Terminal()
    each = ", ".join(f"{seed}: {mean:.3f}" for seed, mean in means.items())
    with console.tolerated():
        overall = sum(means.values()) / len(means)
        console.print(
            f"success by seed: {each}; mean {overall:.3f}", highlight=False, soft_wrap=True
        )
