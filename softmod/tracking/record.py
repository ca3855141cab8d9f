"""Reader of a run's journal; a process may be writing to it, or was killed while writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softmod.errors import ConfigError

JOURNAL = "journal.jsonl"
SCHEMA = 1
LARGEST = 10**300  # bound of integers, so that they can be converted to floats

Line = dict[str, Any]
Routes = list[list[list[float]]]  # of a layer: task, target, source


def lines(path: Path, offset: int = 0) -> Iterator[tuple[Line, int]]:
    """Yield the valid lines of a journal, each with the byte offset after it; skip damaged ones.

    Args:
        path: the journal's path.
        offset: byte to start at.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while (raw := file.readline()).endswith(b"\n"):
            offset += len(raw)
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if _valid(line):
                yield line, offset


FIELDS: dict[str, dict[str, type]] = {
    "header": {"schema": int, "run_id": str},
    "session": {"run_id": str},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"step": int, "values": dict},
    "routes": {"step": int, "tasks": list, "layers": list},
    "artifact": {"path": str, "under": str},
    "status": {"status": str},
}


def _valid(line: Any) -> bool:
    """Return True if a line has the fields that its kind needs; damage must not stop a run."""
    fields = FIELDS.get(line.get("kind", "")) if isinstance(line, dict) else None
    if fields is None:
        return False
    for name, kind in {"time": int, **fields}.items():
        if not isinstance(line.get(name), kind):
            return False
    return line["kind"] != "metrics" or all(map(_is_number, line["values"].values()))


def _is_number(value: Any) -> bool:
    """Return True for a number, or a string that stands for a non-finite one."""
    if isinstance(value, int):
        return abs(value) < LARGEST
    return isinstance(value, float) or value in ("nan", "inf", "-inf")


@dataclass
class Record:
    """Content of a journal: the first value of each metric at each step, the last of all else."""

    run_id: str = ""
    started: int = 0  # ms since the epoch
    status: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    routes: set[int] = field(default_factory=set)  # steps

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read the journal in a run's folder; needs no lock.

        Raises:
            ConfigError: there is no journal, or a newer version of softmod wrote it.
        """
        record = cls()
        try:
            for line, _ in lines(folder / JOURNAL):
                record.absorb(line)
        except OSError as error:
            raise ConfigError(f"{folder}: holds no journal of a run ({error.strerror})") from error
        return record

    def absorb(self, line: Line) -> None:
        """Add a line of the journal.

        Raises:
            ConfigError: a newer version of softmod wrote it.
        """
        match line.get("kind"):
            case "header" | "session":
                if line["kind"] == "header" and line["schema"] > SCHEMA:
                    raise ConfigError(
                        f"{JOURNAL}: written by a newer version of softmod (schema"
                        f" {line['schema']}; this version reads {SCHEMA})"
                    )
                self.run_id = self.run_id or line["run_id"]
                self.started = self.started or line["time"]
            case "params":
                self.params |= line["values"]
            case "tags":
                self.tags |= line["values"]
            case "metrics":
                for name, value in line["values"].items():
                    self.values.setdefault(name, {}).setdefault(line["step"], float(value))
            case "routes":
                self.routes.add(line["step"])
            case "status":
                self.status = line["status"]

    def names(self) -> list[str]:
        """Return the names of the metrics."""
        return sorted(self.values)

    def names_at(self, step: int) -> list[str]:
        """Return the names of the metrics that have a value at a step."""
        return [name for name in self.names() if step in self.values[name]]

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return a metric as (step, value) pairs, by step."""
        return sorted(self.values.get(name, {}).items())
