"""`python -m softmod.state <checkpoint or run folder>`: the hash of a run's state, component by
component.

`pack <checkpoint or run folder> <output folder>` writes the state as a few small files that travel,
`unpack <folder>` makes a run's folder of them again, with the same hash, from which the run's
command goes on.

Two runs with equal hashes are in the same state to the bit. What depends on the wall clock is left
out. Equality is promised for the same type of machine, the same versions, and the numbers of
processes and threads that a run keeps.
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
from softmod.tracking.names import WALL_CLOCK
from softmod.tracking.record import JOURNAL, lines

RAW = argparse.RawDescriptionHelpFormatter
COMPONENTS = {  # of the agent's arrays, by how their names begin
    "networks": ("actor.", "critic."),
    "targets": ("target_critic.",),
    "average": ("averaged_actor.",),
    "statistics": ("moments.", "return_scale.", "success_rates."),
    "temperatures": ("log_temperature",),
}


def main(arguments: list[str] | None = None) -> int:
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
            "path", type=Path, help="a checkpoint, or a run's folder for its newest one"
        )
        _print(find(parser.parse_args(words).path, whole=True)[0])
    except SoftmodError as error:
        print(f"softmod: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _pack(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m softmod.state pack", description="Write a run as a few small files."
    )
    parser.add_argument(
        "path", type=Path, help="a checkpoint, or a run's folder for its newest one"
    )
    parser.add_argument("output", type=Path, help="a folder, empty or not there yet")
    parser.add_argument(
        "--part", type=int, default=16, metavar="MiB", help="size of a part at most (16)"
    )
    chosen = parser.parse_args(words)
    if chosen.part < 1:
        parser.error("--part: must be at least 1")
    files = pack(*find(chosen.path, whole=True), chosen.output, chosen.part * 2**20)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{chosen.output}: {len(files)} files, {size:.1f} MiB")
    return 0


def _unpack(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m softmod.state unpack", description="Make a run's folder of packed files."
    )
    parser.add_argument("packed", type=Path, help="the folder that pack has written")
    parser.add_argument(
        "runs", type=Path, nargs="?", default=Path("runs"), help="where runs are kept (runs)"
    )
    chosen = parser.parse_args(words)
    _print(unpack(chosen.packed, chosen.runs))
    return 0


def _print(folder: Path) -> None:
    hashes = state_hash(folder)
    print(folder)
    for name, hashed in hashes.items():
        print(f"  {name:<14}{hashed}")


def state_hash(folder: Path) -> dict[str, str]:
    """The hash of every component of a whole checkpoint, and of all of them as "state".

    Raises:
        CheckpointError: it is damaged, or holds weights only.
    """
    facts = checkpoint.verify(folder)
    with checkpoint.reading(folder):
        if facts["kind"] != "whole":
            raise CheckpointError(
                f"{folder}: holds weights only; the state of a run is in a step_... checkpoint"
            )
        return components(folder, facts)


def components(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """The hashes of a whole checkpoint's components, and of all of them."""
    agent = checkpoint.arrays(folder, "agent")
    hashes = {
        name: of_arrays({key: value for key, value in agent.items() if key.startswith(begin)})
        for name, begin in COMPONENTS.items()
    }
    for group in ("optimizers", "episodes"):
        hashes[group] = of_arrays(checkpoint.arrays(folder, group))
    copies = int(
        facts["config"]["workers"]["copies"]
    )  # rows of states before those that can be drawn
    capacity = int(facts["config"]["run"]["replay_per_task"]) + copies
    hashes["replay"] = of_replay(folder, int(facts["counters"]["written"]), capacity)
    hashes["begun"] = of_arrays(checkpoint.arrays(folder, "policy"))
    hashes["counters"] = of_json(counters(facts))
    hashes["metrics"] = of_json(
        sorted(metrics(folder.resolve().parent.parent, facts["clock"]["env_steps"]), key=str)
    )
    return hashes | {"state": of_json(hashes)}


def of_arrays(arrays: checkpoint.Arrays) -> str:
    """Of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        total.update(array.numpy().tobytes())
    return total.hexdigest()


def of_replay(folder: Path, written: int, capacity: int) -> str:
    """Hash the rows of each task in the order of their writing, and their episodes, whatever pieces
    they lie in.
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


def counters(facts: dict[str, Any]) -> dict[str, Any]:
    """All counters, among them the addresses of the random streams: updates and, per environment,
    episodes.
    """
    clock = {name: value for name, value in facts["clock"].items() if name != "seconds"}
    return {
        "clock": clock,
        "seed": facts["seed"],
        **{name: facts[name] for name in ("counters", "begun", "log")},
    }


def metrics(run: Path, env_steps: int) -> Iterator[tuple[str, int, float]]:
    """Every metric of the journal up to a step, but those that depend on the wall clock."""
    journal = run / JOURNAL
    for line, _ in lines(journal) if journal.is_file() else ():
        if line["kind"] == "metrics" and line["step"] <= env_steps:
            for name, value in line["values"].items():
                if not name.startswith(WALL_CLOCK):
                    yield name, line["step"], value


def of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
