"""Reading a run's journal: what a file of JSON lines says that a process may be writing, or was
killed in writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softmod.errors import ConfigError

JOURNAL = "journal.jsonl"
SCHEMA = 1
LARGEST = 10**300  # of whole numbers, so that they are floats too

Line = dict[str, Any]
Routes = list[list[list[float]]]  # of a layer: task, target, source


def lines(path: Path, offset: int = 0) -> Iterator[tuple[Line, int]]:
    """The whole lines of a journal from a byte offset on, each with the offset behind it; torn ones
    are passed over.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while (raw := file.readline()).endswith(b"\n"):
            offset += len(raw)
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if _sound(line):
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


def _sound(line: Any) -> bool:
    """Whether a line has what its kind needs; a damaged file must not stop a run."""
    fields = FIELDS.get(line.get("kind", "")) if isinstance(line, dict) else None
    if fields is None or not all(
        isinstance(line.get(name), kind) for name, kind in {"time": int, **fields}.items()
    ):
        return False
    return line["kind"] != "metrics" or all(
        isinstance(value, float)
        or value in ("nan", "inf", "-inf")
        or (isinstance(value, int) and abs(value) < LARGEST)
        for value in line["values"].values()
    )


@dataclass
class Record:
    """Hold what a journal says: the first value of each metric at each step, the last of everything
    else.
    """

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
            ConfigError: there is no journal, or a newer version of this program wrote it.
        """
        record = cls()
        try:
            for line, _ in lines(folder / JOURNAL):
                record.absorb(line)
        except OSError as error:
            raise ConfigError(f"{folder}: holds no journal of a run ({error.strerror})") from error
        return record

    def absorb(self, line: Line) -> None:
        """Take in one line."""
        match line.get("kind"):
            case "header" | "session":
                if line["kind"] == "header" and line["schema"] > SCHEMA:
                    raise ConfigError(
                        f"{JOURNAL}: written by a newer softmod (schema {line['schema']}, known:"
                        f" {SCHEMA})"
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
        """The metrics that there are."""
        return sorted(self.values)

    def history(self, name: str) -> list[tuple[int, float]]:
        """One metric as (step, value), by step."""
        return sorted(self.values.get(name, {}).items())
