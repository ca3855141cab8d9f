"""`python -m softmod.state <checkpoint or run folder>`: the hash of a run's state, component by component.

Two runs with equal hashes are in the same state to the bit. What depends on the wall clock is left out. Equality is
promised for the same type of machine, the same versions, and the numbers of processes and threads that a run keeps.
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

from softmod import checkpoint
from softmod.archive import FOLDER, span
from softmod.errors import CheckpointError, SoftmodError
from softmod.policy import find
from softmod.record import JOURNAL, lines
from softmod.tracking import WALL_CLOCK

COMPONENTS = {  # of the agent's arrays, by how their names begin
    "networks": ("actor.", "critic."),
    "targets": ("target_critic.",),
    "average": ("averaged_actor.",),
    "statistics": ("moments.", "return_scale."),
    "temperatures": ("log_temperature",),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m softmod.state", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's folder for its newest one")
    try:
        folder, _ = find(parser.parse_args(arguments).path)
        hashes = state_hash(folder)
    except SoftmodError as error:
        print(f"softmod: {error}", file=sys.stderr)
        return error.exit_code
    print(folder)
    for name, hashed in hashes.items():
        print(f"  {name:<14}{hashed}")
    return 0


def state_hash(folder: Path) -> dict[str, str]:
    """The hash of every component of a whole checkpoint, and of all of them as "state".

    Raises:
        CheckpointError: it is damaged, or holds weights only.
    """
    facts = checkpoint.verify(folder)
    with checkpoint.reading(folder):
        if facts["kind"] != "whole":
            raise CheckpointError(f"{folder}: holds weights only; the state of a run is in a step_... checkpoint")
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
    capacity = int(facts["config"]["run"]["replay_per_task"])
    hashes["replay"] = of_replay(folder, int(facts["counters"]["written"]), capacity)
    hashes["begun"] = of_arrays(checkpoint.arrays(folder, "policy"))
    hashes["counters"] = of_json(counters(facts))
    hashes["metrics"] = of_json(sorted(metrics(folder.parent.parent, facts["clock"]["env_steps"]), key=str))
    return hashes | {"state": of_json(hashes)}


def of_arrays(arrays: checkpoint.Arrays) -> str:
    """Of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        total.update(array.numpy().tobytes())
    return total.hexdigest()


def of_replay(folder: Path, written: int, capacity: int) -> str:
    """Hash the rows of each task in the order of their writing, and their episodes, whatever pieces they lie in."""
    total, run = hashlib.sha256(f"{written}".encode()), folder.parent.parent
    pieces = sorted(Path(name).name for name in checkpoint.shared(folder))
    files = [(span(name)[0], safe_open(run / FOLDER / name, "numpy")) for name in pieces]
    oldest = max(0, written - capacity)
    for task in range(files[0][1].get_slice("rows").get_shape()[0] if files else 0):
        entries: dict[int, bytes] = {}
        for first, file in files:
            rows = file.get_slice("rows")[task, max(0, oldest - first) :]
            total.update(rows.tobytes())
            began, episodes = int(file.get_slice("first_episode")[task]), file.get_slice("episodes")[task]
            numbers = sorted(set(rows[:, -1].astype(int).tolist()))
            entries |= {number: episodes[number - began].tobytes() for number in numbers}
        for number in sorted(entries):
            total.update(entries[number])
    return total.hexdigest()


def counters(facts: dict[str, Any]) -> dict[str, Any]:
    """All counters, among them the addresses of the random streams: updates and, per environment, episodes."""
    clock = {name: value for name, value in facts["clock"].items() if name != "seconds"}
    return {"clock": clock, "seed": facts["seed"], **{name: facts[name] for name in ("counters", "begun", "log")}}


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
