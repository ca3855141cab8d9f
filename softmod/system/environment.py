"""Variables of the process's environment, changed for a while or for a child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSTALLED = ("site-packages", "dist-packages")  # folders that every child process searches


@contextmanager
def changed(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables within this context, and remove those whose value is None."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def of_children() -> dict[str, str]:
    """Return variables with which a Python process finds modules where this one does.

    Python searches the working folder first with `-c` and `-m`. A `queue.py` there would break a
    child process even if this process does not search that folder, as in a console script.
    """
    try:
        if os.getcwd() in map(os.path.abspath, sys.path):
            return {}
    except FileNotFoundError:  # the folder was deleted
        return {}
    variables = {"PYTHONSAFEPATH": "1"}
    if PACKAGE.parent.name not in INSTALLED:
        others = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *filter(None, [others])])
    return variables
