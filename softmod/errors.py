"""What can end a run, each with the exit code that the documentation promises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 12  # names, at most, in the answer to a faulty line
LISTED_LENGTH = 150  # characters of these


class SoftmodError(Exception):
    """A failure that is told in one line."""

    exit_code = 1


class ConfigError(SoftmodError):
    """The command line or a configuration is wrong; nothing was created."""

    exit_code = 2


class CheckpointError(SoftmodError):
    """No valid checkpoint where one is needed."""

    exit_code = 3


class SaveError(SoftmodError):
    """A checkpoint could not be written, several times in a row."""

    exit_code = 4


class WorkerError(SoftmodError):
    """An environment or the process that steps it failed."""

    exit_code = 5


class PhysicsError(WorkerError):
    """The physics of an episode broke; a few such episodes are cut short, and the run goes on."""

    exit_code = 6


class NumericalError(SoftmodError):
    """Losses or gradients stayed non-finite, or the physics broke too often."""

    exit_code = 6


class UpdateError(NumericalError):
    """Updates stayed non-finite: there is one to be looked at."""


def one_line(error: Exception) -> str:
    """Return an exception as one line: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# --- the nearest valid name -----------------------------------------------------------------------


def listed(names: list[str], word: str = "") -> str:
    """Names in a line: all of them, or of many those that are most like `word`, and how many more
    there are.
    """
    if len(names) <= LISTED:
        return ", ".join(names)
    close = difflib.get_close_matches(word, names, LISTED, 0.0)
    while len(", ".join(close)) > LISTED_LENGTH:
        close.pop()
    return f"{', '.join(close)} and {len(names) - len(close)} more (--help)"


def near(word: str, names: Iterable[str]) -> str:
    """The nearest valid name, if one is near."""
    close = difflib.get_close_matches(word, list(names), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""
