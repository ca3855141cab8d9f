"""The lines that a run printed, in `train.log` in its folder, over all its sessions."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softmod.tracking.redact import redacted

TRANSCRIPT = "train.log"
PACKAGE = __name__.partition(".")[0]


class Transcript(io.TextIOBase):
    """A text stream that appends to `train.log`, without passwords.

    A file that cannot be written is ignored: what a run printed is not worth the run.

    Args:
        folder: the run's folder; it has to exist.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / TRANSCRIPT

    def write(self, text: str) -> int:
        """Append text; return the number of characters given."""
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(redacted(text))
        return len(text)

    def line(self, text: str) -> None:
        """Append a line."""
        self.write(f"{text}\n")

    def begin(self, command: str) -> None:
        """Append the time and the command of a session."""
        self.line(f"--- {time.strftime('%F %T')}  {command}")

    @contextmanager
    def of_warnings(self) -> Iterator[None]:
        """Append the warnings that softmod logs within this context."""
        handler = Warnings(self)
        package = logging.getLogger(PACKAGE)
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)


class Warnings(logging.Handler):
    """Writes warnings to a transcript; they are printed as they would be without this handler."""

    def __init__(self, transcript: Transcript) -> None:
        super().__init__(logging.WARNING)
        self.transcript = transcript

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning; print it if no other handler will."""
        self.transcript.line(self.format(record))
        first = logging.getLogger(PACKAGE).handlers[0] is self
        if first and not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)
