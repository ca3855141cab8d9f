"""Upload of the journal to MLflow by a separate process.

Training starts it, never waits for it while it trains, and sends it a shutdown request at the end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmod.config.schema import TrackingConfig
from softmod.system.environment import of_children
from softmod.system.signals import kept_from_children
from softmod.tracking import destination
from softmod.tracking import mlflow_store as store
from softmod.tracking.record import JOURNAL
from softmod.tracking.redact import redacted

logger = logging.getLogger(__name__)

CURSOR = ".uploaded"  # state of the upload
LOG = "upload.log"
SWEEPS = ".sweeps"  # sweeps of the run that MLflow has completely, and their stores
POLL = 0.1  # seconds
LOCK = ".uploading"  # holds STARTED once the uploader has its turn at the store, or failed
STARTED = b"1"
INTERRUPTED_DRAIN = 2.0  # seconds left for uploading after Ctrl-C
START = 120.0  # seconds to start, since many jobs may do so at once
MAX_REASON = 200  # characters


class Uploader:
    """Handle of the uploading process; close it once the journal has the run's final status.

    Args:
        process: None if it could not be started.
        folder: the run's folder.
        logged: size of its upload.log before, in bytes.
    """

    def __init__(
        self, process: subprocess.Popen[bytes] | None, folder: Path, logged: int = 0
    ) -> None:
        self.process = process
        self.folder = folder
        self.logged = logged

    @property
    def complete(self) -> bool:
        """Return True if MLflow has everything; else `python -m softmod.upload` completes it."""
        return self.process is not None and self.process.returncode == 0

    @property
    def reason(self) -> str:
        """Return the last line that the process logged, without its time; empty if none."""
        try:
            with (self.folder / LOG).open("rb") as log:
                log.seek(self.logged)
                *_, last = log.read().decode(errors="replace").strip().splitlines()
        except (OSError, ValueError):
            return ""
        return redacted(re.sub(r"^[-\d]+ [:\d]+ | \(trying again\)$", "", last))[:MAX_REASON]

    def close(self, drain_seconds: float, interrupted: bool = False) -> bool:
        """Wait for the upload to complete, then end the process; return True if it is complete.

        Args:
            drain_seconds: how long to wait while the upload does not advance.
            interrupted: the run was interrupted: wait for at most `INTERRUPTED_DRAIN` seconds.
        """
        process = self.process
        if process is None:
            return False
        patience = Patience(self.folder, drain_seconds, interrupted)
        try:
            _request_shutdown(process, patience)
            while process.poll() is None and not patience.exhausted():
                time.sleep(POLL)
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(drain_seconds, INTERRUPTED_DRAIN))
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return self.complete


class Patience:
    """Limit on the upload after training ended: it may go on as long as it advances.

    Many jobs that end together share processors and a store. The
    uploader and the run each wait by this rule.

    Args:
        folder: the run's folder.
        seconds: allowed without an advance; an uploader that is still starting has `START`.
        interrupted: allow at most `INTERRUPTED_DRAIN` seconds in all.
    """

    def __init__(self, folder: Path, seconds: float, interrupted: bool) -> None:
        self.cursor = folder / CURSOR
        self.lock = folder / LOCK
        self.seconds = min(seconds, INTERRUPTED_DRAIN) if interrupted else seconds
        self.interrupted = interrupted
        self.last = time.monotonic()
        self.state = self._state()

    def exhausted(self) -> bool:
        """Return True once the time is over; to be called often."""
        if not self.interrupted and (state := self._state()) != self.state:
            self.state = state
            self.last = time.monotonic()
        return time.monotonic() - self.last > self._allowed()

    def _allowed(self) -> float:
        """Return the seconds that are allowed without an advance."""
        with suppress(OSError):
            if not self.interrupted and self.lock.stat().st_size == 0:
                return max(self.seconds, START)
        return self.seconds

    def _state(self) -> list[int]:
        """Return when the uploader had its turn, and when it last saved what it had sent."""
        times = []
        for path in (self.lock, self.cursor):
            with suppress(OSError):
                times.append(path.stat().st_mtime_ns)
        return times


def start_uploader(folder: Path, tracking: TrackingConfig, metadata: Mapping[str, Any]) -> Uploader:
    """Start uploading a run's journal; errors are written to the run's upload.log, not raised.

    Args:
        folder: the run's folder, with its journal.
        tracking: configuration of the store.
        metadata: as for `destination.save`.
    """
    uri = store.store_uri(tracking.uri)
    command = [sys.executable, "-m", "softmod.upload", str(folder), "--follow"]
    try:
        (folder / LOCK).write_bytes(b"")
        destination.save(folder, tracking, metadata)
        with (folder / LOG).open("ab") as log, kept_from_children():
            logged = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # keeps Ctrl-C from the uploader
                # May contain a password, so it is not passed on the command line.
                env=os.environ | of_children() | {"MLFLOW_TRACKING_URI": uri},
            )
    except OSError as error:
        logger.warning("%s: the upload to MLflow cannot be started (%s)", folder, error)
        return Uploader(None, folder)
    return Uploader(process, folder, logged)


def report_start(folder: Path) -> None:
    """Mark the uploader of a run as started, once."""
    lock = folder / LOCK
    if not lock.exists() or not lock.stat().st_size:
        lock.write_bytes(STARTED)


def is_uploaded(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> bool:
    """Return True if this store has the whole run, as a member of this sweep if there is one.

    A run that was deleted in the dashboard counts as uploaded. A server is not asked.
    """
    uri = store.store_uri(tracking.uri)
    try:
        cursor = json.loads((folder / CURSOR).read_text(encoding="utf-8"))
        return (
            cursor["uri"] == redacted(uri)
            and cursor["offset"] == (folder / JOURNAL).stat().st_size
            and cursor["status_sent"]
            and not (cursor["artifacts"] or cursor["pictures"])
            and (sweep is None or _member(tracking, sweep) in _members(folder))
            and store.may_have(uri, cursor["run"])
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def mark_uploaded(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> None:
    """Record that MLflow has the whole run as a member of this sweep.

    A failure is ignored: the run is then uploaded again.
    """
    if sweep is None or _member(tracking, sweep) in _members(folder):
        return
    with suppress(OSError), (folder / SWEEPS).open("a", encoding="utf-8") as file:
        file.write(_member(tracking, sweep) + "\n")


def uploaded_experiment(folder: Path, uri: str) -> str | None:
    """Return the id of the experiment that a run is uploaded to; None if it is not known yet.

    Args:
        folder: the run's folder.
        uri: of the store, as `mlflow_store.store_uri` returns it.
    """
    try:
        cursor = json.loads((folder / CURSOR).read_text(encoding="utf-8"))
        return str(cursor["experiment"] or "") or None if cursor["uri"] == redacted(uri) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _member(tracking: TrackingConfig, sweep: Mapping[str, str]) -> str:
    """Return the line that marks a run as uploaded to this sweep and store."""
    return f"{sweep['id']} {redacted(store.store_uri(tracking.uri))}"


def _members(folder: Path) -> list[str]:
    """Return the lines that mark a run as uploaded."""
    try:
        return (folder / SWEEPS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _request_shutdown(process: subprocess.Popen[bytes], patience: Patience) -> None:
    """Send the drain time and close the pipe; a pipe closed without it means training died."""
    if process.stdin is None or process.stdin.closed:
        return
    try:
        process.stdin.write(f"{patience.seconds} {int(patience.interrupted)}\n".encode())
        process.stdin.close()
    except OSError:  # the process has ended
        pass
