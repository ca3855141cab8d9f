"""`python -m softmod.upload <run folder>`: send the missing part of a run's journal to MLflow.

Training starts it with `--follow` as a process of its own, an evaluation with `--evaluation`. Exit
codes: 0 everything is sent, 1 not everything is sent, 2 there is no run.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from softmod.errors import ConfigError
from softmod.experiment.folder import refuse_links
from softmod.system import signals
from softmod.system.files import locked
from softmod.system.streams import exit_with, say
from softmod.tracking import evaluation
from softmod.tracking.mlflow_store import prepare_environment
from softmod.tracking.record import JOURNAL
from softmod.tracking.redact import redacted
from softmod.tracking.sender import Sender
from softmod.tracking.uploader import LOCK, Patience, report_start

POLL = 0.5  # seconds between uploads
# seconds before a retry
FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
ORPHAN_SECONDS = 1.5  # for the remaining lines after training was killed
TURN_SECONDS = 5.0  # for another uploader of the same run to end


class Parent:
    """The training process, watched through the pipe on stdin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gone = threading.Event()
        self.sender: Sender | None = None  # of the main thread
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Wait until the pipe closes, then end this process.

        The pipe carries the seconds that the uploader may still take, and whether training was
        interrupted. It is empty if training was killed.
        """
        sent = sys.stdin.buffer.read().split()
        seconds, interrupted = (float(sent[0]), sent[1] == b"1") if sent else (ORPHAN_SECONDS, True)
        self.gone.set()
        if not sent:  # the main thread may be sending other things for longer than the time left
            threading.Thread(target=self._send_final_status, daemon=True).start()
        patience = Patience(self.folder, seconds, interrupted)
        while not patience.exhausted():
            time.sleep(POLL)
        os._exit(1)

    def _send_final_status(self) -> None:
        """Try to send the status; the main thread tries too, and reports errors."""
        if self.sender:
            with suppress(Exception):
                self.sender.send_final_status()


class Redacting:
    """Stream that strikes out passwords, since libraries print addresses into the log."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write redacted text; return the number of characters given."""
        self.stream.write(redacted(text))
        self.stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def follow(folder: Path) -> None:
    """Upload while training runs, and once more after it ended."""
    for number in (signal.SIGINT, *signals.STOPS):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole job; only stdin ends this process
    os.nice(5)
    parent = Parent(folder)
    sender = None
    delay = FIRST_DELAY
    last = ""
    with turn(folder, patience=float("inf")):
        while True:
            ending = parent.gone.is_set()
            try:
                sender = parent.sender = sender or Sender(folder)
                if ending:
                    sender.end()
                sender.send()
                if ending:
                    sender.sum_up()
                    return
                delay = FIRST_DELAY
                parent.gone.wait(POLL)
            except ConfigError:
                raise
            except Exception as error:
                sender = None  # what it found may have changed, such as a sweep's run
                last = complain(error, last)
                report_start(folder)  # nobody needs to wait for a slow start any more
                time.sleep(FIRST_DELAY) if ending else parent.gone.wait(delay)
                delay = min(2.0 * delay, LONGEST_DELAY)


def complain(error: Exception, last: str) -> str:
    """Print an error in one line, unless it equals the last line; return the line."""
    line = one_line(error)
    if line != last:
        say(f"{time.strftime('%F %T')} {line} (trying again)")
    return line


def one_line(error: Exception) -> str:
    """Return an exception as one redacted line of at most 500 characters."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")[:500]


def once(folder: Path) -> None:
    """Upload what is missing and print how much it was."""
    logging.disable(logging.WARNING)
    with turn(folder, patience=TURN_SECONDS):
        sender = Sender(folder)
        sender.start_over_if_artifacts_are_lost()
        sender.end()
        sender.send()
        sender.sum_up()
    say(
        f"{folder}: sent {sender.metrics_sent} metrics and {sender.artifacts_sent} artifacts to"
        f" {sender.uri}; nothing is missing"
    )


@contextmanager
def turn(folder: Path, patience: float) -> Iterator[None]:
    """Hold the lock that lets one process at a time upload a run.

    Args:
        folder: The run's folder.
        patience: Seconds to wait for the lock.

    Raises:
        ConfigError: The folder has no journal.
        TimeoutError: Another process holds the lock.
    """
    if not (folder / JOURNAL).is_file():
        raise ConfigError(f"{folder}: holds no journal of a run")
    refuse_links(folder)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not locked(fd, patience):
            raise TimeoutError(f"another process is uploading {folder}")
        yield
    finally:
        os.close(fd)


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m softmod.upload", description="Send a run's journal to MLflow."
    )
    parser.add_argument("folder", type=Path, help="the run's folder, with journal.jsonl")
    parser.add_argument(
        "--follow", action="store_true", help="upload until stdin closes; used by training"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="OUTPUT",
        help="send an evaluation instead: the folder with evaluation.json, and videos if any",
    )
    arguments = parser.parse_args()
    prepare_environment()
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)
    try:
        if arguments.evaluation:
            refuse_links(arguments.folder)
            say(evaluation.send(arguments.folder, arguments.evaluation))
        else:
            (follow if arguments.follow else once)(arguments.folder)
    except ConfigError as error:
        print(redacted(str(error)), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        print(f"{arguments.folder}: not uploaded: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exit_with(main)
