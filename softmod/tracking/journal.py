"""The journal that everything a run reports is written to before anything else.

It is one file of JSON lines in the run's folder, only ever appended to.
`softmod.tracking.uploader` carries it to MLflow from a process of its own, so that nothing here
waits for a server. Imports neither torch nor MLflow.
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
from softmod.system.files import locked
from softmod.tracking.names import WALL_CLOCK
from softmod.tracking.record import JOURNAL, SCHEMA, Record, Routes
from softmod.tracking.redact import redacted

logger = logging.getLogger(__name__)


LOCK = ".lock"
ENDED = ("FINISHED", "FAILED", "KILLED")
STATUSES = ("RUNNING", *ENDED)
FAILURES = 3  # writes that may fail in a row before training is told to stop
PATIENCE = 1.0  # seconds to wait for a run folder that is in use


class Journal:
    """A run's journal, held by this process alone until `close`.

    Metrics get their time here, once. What is written already is not written again, so that a
    resumed run may come by the same steps twice. A write that fails is tried again with the next
    one.

    Args:
        folder: the run's; made where it is missing.

    Raises:
        ConfigError: another process holds the folder, it cannot be written, or the journal is from
            a newer version.
        SaveError: (from any method that writes metrics, params, tags or artifacts) the third write
            in a row failed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._lock = _take(self.folder)
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
        self._begin()

    @property
    def run_id(self) -> str:
        """The run's identity, by which MLflow's run is found."""
        return self.record.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Write the configuration; nested mappings get dotted names, passwords in URIs are struck
        out.
        """
        new = {
            name: value
            for name, value in _flat(values)
            if name not in self.record.params or self.record.params[name] != value
        }
        if new:
            self._append("params", values=new)

    def tags(self, values: Mapping[str, str]) -> None:
        """Write the tags that a run is found by."""
        new = {name: redacted(str(value)) for name, value in values.items()}
        new = {name: value for name, value in new.items() if self.record.tags.get(name) != value}
        if new:
            self._append("tags", values=new)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write those values that this step does not have yet."""
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
        """Write how the modules are used at a step: per layer the probabilities
        `[task][target][source]`, kept once.
        """
        if step not in self.record.routes:
            rounded = [
                [[[round(p, 4) for p in row] for row in task] for task in layer] for layer in layers
            ]
            self._append("routes", step=int(step), tasks=list(tasks), layers=rounded)

    def artifact(self, path: Path, under: str = "") -> None:
        """A file or folder of the run's folder, as it is when it comes to be uploaded."""
        inside = Path(path).resolve().relative_to(self.folder.resolve())
        self._append("artifact", path=str(inside), under=under)

    def status(self, word: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; reaches the disk before this returns.

        A failure is a log line only.
        """
        if word not in STATUSES:
            raise ValueError(f"status {word!r} is none of {', '.join(STATUSES)}")
        try:
            self._append("status", status=word)
            self.sync()
        except SaveError as error:
            logger.error("%s", error)

    def names(self) -> list[str]:
        """The metrics that there are."""
        return self.record.names()

    def history(self, name: str) -> list[tuple[int, float]]:
        """One metric as (step, value), by step."""
        return self.record.history(name)

    def sync(self) -> None:
        """Bring everything to the disk.

        Raises:
            SaveError: something did not get there; it stays pending.
        """
        self._write()
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise SaveError(
                f"{self.folder / JOURNAL}: cannot be written ({error.strerror})"
            ) from error
        if self._pending:
            raise SaveError(f"{self.folder / JOURNAL}: cannot be written")

    def close(self) -> None:
        """Let go of the folder; again is harmless."""
        if self._fd < 0:
            return
        try:
            self._write()
        except SaveError as error:
            logger.error("%s", error)
        os.close(self._fd)
        os.close(self._lock)
        self._fd = -1

    def _begin(self) -> None:
        """A process takes over; the first one names the run."""
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
                "%s at step %d: computed again it is %r, the journal keeps %r",
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
        """Everything pending, by one call; what does not get written stays pending."""
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
                "%s: cannot be written (%s); trying again", self.folder / JOURNAL, error.strerror
            )
        else:
            self._pending = b""
            self._failures = 0


def _open(path: Path) -> int:
    """A file to append lines to, behind the one that a kill may have torn."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return fd


def now() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def _encoded(value: float) -> float | str:
    """JSON has no words for what is not finite."""
    return value if math.isfinite(value) else repr(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    """The value as JSON has it, without passwords."""
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


def _take(folder: Path) -> int:
    """The folder's lock, as a file descriptor; it goes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); run.folder names the place"
        ) from error
    if not locked(fd, PATIENCE):
        holder = os.pread(fd, 100, 0).decode(errors="replace").strip()
        os.close(fd)
        raise ConfigError(
            f"{folder}: run folder in use by process {holder}; run.resume=never begins another"
            " beside it"
        )
    with suppress(OSError):  # a full disk
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {platform.node()}".encode(), 0)
    return fd


def in_use(folder: Path, patience: float = 0.0) -> bool:
    """Return whether a process holds the run's folder, and goes on to."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not locked(fd, patience, shared=True)
    finally:
        os.close(fd)
