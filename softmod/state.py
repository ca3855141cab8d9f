"""`python -m softmod.state <checkpoint or run folder>`: hashes of a run's state, by component.

`pack <checkpoint or run folder> <output folder>` writes the state as a few small files.
`unpack <folder>` restores a run's folder from them, with the same hash; the run's command resumes
from it.

Two runs with equal hashes have bit-identical states. Values that depend on the wall clock are
excluded. Equality is guaranteed for the same machine type, the same package versions, and the
same numbers of processes and threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.load import find
from softmod.checkpoint.packing import pack, unpack
from softmod.checkpoint.replay_files import FOLDER, span
from softmod.errors import CheckpointError, SoftmodError
from softmod.system.streams import complain, exit_with
from softmod.tracking.names import WALL_CLOCK
from softmod.tracking.record import JOURNAL, lines

RAW = argparse.RawDescriptionHelpFormatter
COMPONENTS = {  # component -> name prefixes of the agent's arrays
    "networks": ("actor.", "critic."),
    "targets": ("target_critic.",),
    "average": ("averaged_actor.",),
    "statistics": ("moments.", "return_scale.", "success_rates."),
    "temperatures": ("log_temperature",),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return an exit code of docs/exit_codes.md."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["pack"]:
            return _pack(words[1:])
        if words[:1] == ["unpack"]:
            return _unpack(words[1:])
        parser = argparse.ArgumentParser(
            prog="python -m softmod.state", description=__doc__, formatter_class=RAW
        )
        parser.add_argument(
            "path", type=Path, help="a checkpoint, or a run's folder (its newest checkpoint)"
        )
        _print(find(parser.parse_args(words).path, whole=True)[0])
    except SoftmodError as error:
        complain(f"softmod: {error}")
        return error.exit_code
    return 0


def _pack(words: list[str]) -> int:
    """Run `pack`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m softmod.state pack", description="Write a run as a few small files."
    )
    parser.add_argument(
        "path", type=Path, help="a checkpoint, or a run's folder (its newest checkpoint)"
    )
    parser.add_argument("output", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--part", type=int, default=16, metavar="MiB", help="largest size of a file (16)"
    )
    chosen = parser.parse_args(words)
    if chosen.part < 1:
        parser.error("--part: must be at least 1")
    files = pack(*find(chosen.path, whole=True), chosen.output, chosen.part * 2**20)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{chosen.output}: {len(files)} files, {size:.1f} MiB")
    return 0


def _unpack(words: list[str]) -> int:
    """Run `unpack`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m softmod.state unpack",
        description="Restore a run's folder from packed files.",
    )
    parser.add_argument("packed", type=Path, help="the folder that pack wrote")
    parser.add_argument(
        "runs", type=Path, nargs="?", default=Path("runs"), help="parent folder of all runs (runs)"
    )
    chosen = parser.parse_args(words)
    _print(unpack(chosen.packed, chosen.runs))
    return 0


def _print(folder: Path) -> None:
    """Print the hashes of a checkpoint."""
    hashes = state_hash(folder)
    print(folder)
    for name, hashed in hashes.items():
        print(f"  {name:<14}{hashed}")


def state_hash(folder: Path) -> dict[str, str]:
    """Hash every component of a whole checkpoint, and all of them together as "state".

    Returns:
        SHA-256 by component, in hexadecimal digits.

    Raises:
        CheckpointError: The checkpoint is damaged or holds weights only.
    """
    metadata = checkpoint.verify(folder)
    with checkpoint.reading(folder):
        if metadata["kind"] != "whole":
            raise CheckpointError(
                f"{folder}: holds weights only; the state of a run is in a step_... checkpoint"
            )
        return components(folder, metadata)


def components(folder: Path, metadata: dict[str, Any]) -> dict[str, str]:
    """Hash the components of a whole checkpoint, given its metadata."""
    agent = checkpoint.arrays(folder, "agent")
    hashes = {
        name: of_arrays({key: value for key, value in agent.items() if key.startswith(begin)})
        for name, begin in COMPONENTS.items()
    }
    for group in ("optimizers", "episodes"):
        hashes[group] = of_arrays(checkpoint.arrays(folder, group))
    # the replay keeps one row per environment before the oldest transition that can be drawn
    copies = int(metadata["config"]["workers"]["copies"])
    capacity = int(metadata["config"]["run"]["replay_per_task"]) + copies
    hashes["replay"] = of_replay(folder, int(metadata["counters"]["written"]), capacity)
    hashes["begun"] = of_arrays(checkpoint.arrays(folder, "policy"))
    hashes["counters"] = of_json(counters(metadata))
    hashes["metrics"] = of_json(
        sorted(metrics(folder.resolve().parent.parent, metadata["clock"]["env_steps"]), key=str)
    )
    return hashes | {"state": of_json(hashes)}


def of_arrays(arrays: checkpoint.Arrays) -> str:
    """Hash names, types, shapes and bytes of arrays."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        total.update(array.numpy().tobytes())
    return total.hexdigest()


def of_replay(folder: Path, written: int, capacity: int) -> str:
    """Hash each task's rows in writing order, and their episodes.

    The hash does not depend on how the rows are split into files.

    Args:
        folder: A checkpoint folder.
        written: Rows written per task since the start of the run.
        capacity: Rows per task that the replay holds.
    """
    total = hashlib.sha256(f"{written}".encode())
    run = folder.resolve().parent.parent
    pieces = sorted(Path(name).name for name in checkpoint.shared(folder))
    files = [(span(name)[0], safe_open(run / FOLDER / name, "numpy")) for name in pieces]
    oldest = max(0, written - capacity)
    for task in range(files[0][1].get_slice("rows").get_shape()[0] if files else 0):
        entries: dict[int, bytes] = {}
        for first, file in files:
            rows = file.get_slice("rows")[task, max(0, oldest - first) :]
            total.update(rows.tobytes())
            began = int(file.get_slice("first_episode")[task])
            episodes = file.get_slice("episodes")[task]
            numbers = sorted(set(rows[:, -1].astype(int).tolist()))
            entries |= {number: episodes[number - began].tobytes() for number in numbers}
        for number in sorted(entries):
            total.update(entries[number])
    return total.hexdigest()


def counters(metadata: dict[str, Any]) -> dict[str, Any]:
    """Collect all counters. They include the positions of the random streams."""
    clock = {name: value for name, value in metadata["clock"].items() if name != "seconds"}
    return {
        "clock": clock,
        "seed": metadata["seed"],
        **{name: metadata[name] for name in ("counters", "begun", "log")},
    }


def metrics(run: Path, env_steps: int) -> Iterator[tuple[str, int, float]]:
    """Yield name, env step and value of each metric in the journal up to a step.

    Metrics that depend on the wall clock are left out.
    """
    journal = run / JOURNAL
    for line, _ in lines(journal) if journal.is_file() else ():
        if line["kind"] == "metrics" and line["step"] <= env_steps:
            for name, value in line["values"].items():
                if not name.startswith(WALL_CLOCK):
                    yield name, line["step"], value


def of_json(value: Any) -> str:
    """Hash a value's JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    exit_with(main)
