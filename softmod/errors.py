"""The errors that end a run, each with its documented exit code (docs/exit_codes.md)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 12  # most names in an error message
LISTED_LENGTH = 150  # most characters of these names


class SoftmodError(Exception):
    """A failure that is reported in one line, without a traceback."""

    exit_code = 1


class ConfigError(SoftmodError):
    """An invalid command line or configuration; raised before anything is created."""

    exit_code = 2


class CheckpointError(SoftmodError):
    """A required checkpoint that is missing or invalid."""

    exit_code = 3


class SaveError(SoftmodError):
    """A checkpoint that could not be written, after several attempts in a row."""

    exit_code = 4


class WorkerError(SoftmodError):
    """A failure of an environment, or of the process that steps it."""

    exit_code = 5


class PhysicsError(WorkerError):
    """A physics error in an episode: it cuts the episode short; only repeated errors end a run."""

    exit_code = 6


class NumericalError(SoftmodError):
    """Losses or gradients that stay non-finite, or too many physics errors."""

    exit_code = 6


class UpdateError(NumericalError):
    """Updates that stay non-finite; the last one can be saved for inspection."""


def one_line(error: Exception) -> str:
    """Return an exception's type and message as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# --- the nearest valid name -----------------------------------------------------------------------


def listed(names: list[str], word: str = "") -> str:
    """Return names as one line.

    If there are more than 12 names, list those closest to `word` and count the others.
    """
    if len(names) <= LISTED:
        return ", ".join(names)
    close = difflib.get_close_matches(word, names, LISTED, 0.0)
    while len(", ".join(close)) > LISTED_LENGTH:
        close.pop()
    return f"{', '.join(close)} and {len(names) - len(close)} more (--help)"


def near(word: str, names: Iterable[str]) -> str:
    """Return a suffix that suggests the closest valid name; empty if none or `word` is close."""
    close = difflib.get_close_matches(word, list(names), 1, 0.5)
    return f"; did you mean {close[0]}?" if close and close[0] != word else ""
