"""The command `python -m softmod.envs [set]`: list tasks, their meaning and their sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from softmod.envs.tasks import SETS, TASKS, Task
from softmod.system.streams import exit_with, is_terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """List all tasks or those of one set; return the exit code, 2 for an unknown set."""
    parser = argparse.ArgumentParser(
        prog="python -m softmod.envs", description="List the tasks and their sets."
    )
    parser.add_argument("set", nargs="?", help=f"one of {', '.join(SETS)}; without it, all tasks")
    chosen = parser.parse_args(arguments).set
    if chosen is not None and chosen not in SETS:
        print(f"unknown set '{chosen}'; must be one of {', '.join(SETS)}", file=sys.stderr)
        return 2
    show = _table if is_terminal(sys.stdout) else _lines
    show([TASKS[name] for name in (SETS[chosen] if chosen else TASKS)])
    return 0


def _sets(task: Task) -> str:
    return " ".join(name for name, tasks in SETS.items() if task.name in tasks)


def _note(task: Task) -> str:
    return f" (reward v1 {task.v1_success})" if task.v1_success else ""


def _lines(tasks: Sequence[Task]) -> None:
    for task in tasks:
        print(f"{task.name:<29} {_sets(task):<15} {task.meaning}{_note(task)}")


def _table(tasks: Sequence[Task]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "sets", "what to do", box=None, header_style="bold")
    for task in tasks:
        table.add_row(task.name, _sets(task), task.meaning + _note(task))
    Console().print(table)


if __name__ == "__main__":
    exit_with(main)
