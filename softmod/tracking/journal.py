"""The journal of a run, which receives all metrics, parameters, tags, artifacts and statuses first.

It is an append-only file of JSON lines in the run's folder. `softmod.tracking.uploader` sends it to
MLflow from a separate process, so that training never waits for a server. Imports neither torch nor
MLflow.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmod.errors import ConfigError, SaveError
from softmod.system.files import flush_open, locked
from softmod.tracking.names import WALL_CLOCK
from softmod.tracking.record import JOURNAL, SCHEMA, Record, Routes
from softmod.tracking.redact import redacted

logger = logging.getLogger(__name__)


LOCK = ".lock"
ENDED = ("FINISHED", "FAILED", "KILLED")
STATUSES = ("RUNNING", *ENDED)
FAILURES = 3  # failed writes in a row that raise SaveError
PATIENCE = 1.0  # seconds to wait for a run's folder that is in use


class Journal:
    """A run's journal, locked by this process until `close`.

    Each entry gets its time stamp here. Values that the journal has already are not written again,
    because a resumed run repeats some steps. Lines that could not be written are retried with the
    next ones.

    Args:
        folder: the run's folder; created if missing.

    Raises:
        ConfigError: another process uses the folder, it cannot be written, or a newer version wrote
            the journal.
        SaveError: the third write in a row failed; raised by any method that writes metrics,
            params, tags or artifacts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._lock = _lock_folder(self.folder)
        self._pending, self._failures, self._warned = b"", 0, set[str]()
        try:
            self._fd = _open(self.folder / JOURNAL)
        except ConfigError:
            os.close(self._lock)
            raise
        try:
            self.record = Record.read(self.folder)
        except ConfigError:
            os.close(self._fd)
            os.close(self._lock)
            raise
        self._start_session()

    @property
    def run_id(self) -> str:
        """Return the run's id, by which its run in MLflow is found."""
        return self.record.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Write new or changed parameters.

        Nested mappings are flattened to dotted names. Passwords in URIs are redacted.
        """
        new = {
            name: value
            for name, value in _flat(values)
            if name not in self.record.params or self.record.params[name] != value
        }
        if new:
            self._append("params", values=new)

    def tags(self, values: Mapping[str, str]) -> None:
        """Write new or changed tags, by which runs are found in MLflow."""
        new = {name: redacted(str(value)) for name, value in values.items()}
        new = {name: value for name, value in new.items() if self.record.tags.get(name) != value}
        if new:
            self._append("tags", values=new)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write the metrics that have no value at this step yet.

        A metric that was written with another value keeps its first one; a warning is logged, once
        per metric.
        """
        new = {
            name: float(value)
            for name, value in values.items()
            if self._is_new(name, float(value), step)
        }
        if new:
            self._append(
                "metrics",
                step=int(step),
                values={name: _encoded(value) for name, value in new.items()},
            )

    def routes(self, tasks: Sequence[str], layers: Sequence[Routes], step: int) -> None:
        """Write the routing probabilities at a step, unless the step has some already.

        Args:
            tasks: names of the tasks.
            layers: probabilities `[task][target][source]` per layer.
            step: env steps.
        """
        if step not in self.record.routes:
            rounded = [
                [[[round(p, 4) for p in row] for row in task] for task in layer] for layer in layers
            ]
            self._append("routes", step=int(step), tasks=list(tasks), layers=rounded)

    def artifact(self, path: Path, under: str = "") -> None:
        """Register a file or folder for upload; its content is read at the time of the upload.

        Args:
            path: in the run's folder.
            under: folder among the run's artifacts in MLflow.
        """
        inside = Path(path).resolve().relative_to(self.folder.resolve())
        self._append("artifact", path=str(inside), under=under)

    def status(self, word: str) -> None:
        """Write the run's status and flush it to disk; a failure is only logged.

        Args:
            word: RUNNING, FINISHED, FAILED or KILLED.

        Raises:
            ValueError: it is none of these.
        """
        if word not in STATUSES:
            raise ValueError(f"status={word!r}: must be one of {', '.join(STATUSES)}")
        try:
            self._append("status", status=word)
            self.sync()
        except SaveError as error:
            logger.error("%s", error)

    def names(self) -> list[str]:
        """Return the names of the metrics."""
        return self.record.names()

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return a metric as (step, value) pairs, by step."""
        return self.record.history(name)

    def sync(self) -> None:
        """Write pending lines and flush the file to disk.

        Raises:
            SaveError: not everything was written; the rest stays pending.
        """
        self._write()
        try:
            flush_open(self._fd)
        except OSError as error:
            raise SaveError(
                f"{self.folder / JOURNAL}: cannot be written ({error.strerror})"
            ) from error
        if self._pending:
            raise SaveError(f"{self.folder / JOURNAL}: cannot be written")

    def close(self) -> None:
        """Write pending lines, and release the folder; no-op if closed already."""
        if self._fd < 0:
            return
        try:
            self._write()
        except SaveError as error:
            logger.error("%s", error)
        os.close(self._fd)
        os.close(self._lock)
        self._fd = -1

    def _start_session(self) -> None:
        """Write this process's session line, after a header with the run's id if there is none."""
        if not self.run_id:
            self._append("header", schema=SCHEMA, run_id=uuid.uuid4().hex)
        self._append("session", run_id=self.run_id, pid=os.getpid())

    def _is_new(self, name: str, value: float, step: int) -> bool:
        before = self.record.values.get(name, {}).get(step)
        if before is None:
            return True
        same = value == before or (math.isnan(value) and math.isnan(before))
        if not same and not name.startswith(WALL_CLOCK) and name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%s at step %d: recomputed as %r; the journal keeps %r",
                name,
                step,
                value,
                before,
            )
        return False

    def _append(self, kind: str, **rest: Any) -> None:
        line = {"kind": kind, "time": now(), **rest}
        self.record.absorb(line)
        self._pending += json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        """Write the pending lines with one call; unwritten ones stay pending.

        Raises:
            SaveError: the third write in a row failed.
        """
        if not self._pending:
            return
        try:
            written = os.write(self._fd, self._pending)
            if written < len(self._pending):
                whole = self._pending.rfind(b"\n", 0, written) + 1
                self._pending = b"\n" * (written > whole) + self._pending[whole:]
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._failures += 1
            if self._failures >= FAILURES:
                raise SaveError(
                    f"{self.folder / JOURNAL}: cannot be written ({error.strerror})"
                ) from error
            logger.error(
                "%s: cannot be written (%s); retried with the next entry",
                self.folder / JOURNAL,
                error.strerror,
            )
        else:
            self._pending = b""
            self._failures = 0


def _open(path: Path) -> int:
    """Open a file for appending; terminate a last line that a killed process left incomplete.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return fd


def now() -> int:
    """Return the time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def _encoded(value: float) -> float | str:
    """Return a JSON value: a non-finite number becomes a string, as JSON cannot represent it."""
    return value if math.isfinite(value) else repr(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON represents it, with passwords redacted."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if (
        value is None
        or isinstance(value, bool | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return redacted(str(value))


# --- one process per run folder -------------------------------------------------------------------


def _lock_folder(folder: Path) -> int:
    """Lock a run's folder; return the descriptor of the lock file.

    The lock is released when the descriptor is closed or the process ends.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); set run.folder to a writable path"
        ) from error
    if not locked(fd, PATIENCE):
        holder = os.pread(fd, 100, 0).decode(errors="replace").strip()
        os.close(fd)
        raise ConfigError(
            f"{folder}: run folder in use by process {holder}; run.resume=never starts a new run"
            " beside it"
        )
    with suppress(OSError):  # a full disk
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {platform.node()}".encode(), 0)
    return fd


def in_use(folder: Path, patience: float = 0.0) -> bool:
    """Return True if a process holds the lock of a run's folder for longer than `patience` seconds.

    Needs no write access.
    """
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not locked(fd, patience, shared=True)
    finally:
        os.close(fd)
