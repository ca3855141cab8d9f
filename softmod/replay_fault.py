"""`python -m softmod.replay_fault <bundle>`: the update that ended a run is made again, and what is
wrong is named.

A bundle is what a run leaves when its updates stay non-finite: parameters, optimizers, the batch
and the noise. Running statistics in it (normalised observations, scaled rewards) are those of the
end of the round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmod.agent.replay import Batch
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.bundle import KIND
from softmod.checkpoint.load import spec_of
from softmod.config.compose import from_saved
from softmod.errors import CheckpointError, SoftmodError
from softmod.experiment.build import make_agent, networks
from softmod.experiment.resources import fused, make_fabric


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m softmod.replay_fault", description=__doc__)
    parser.add_argument("bundle", type=Path, help="the folder that the run named when it ended")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="of your own, as in allow=[...]",
    )
    given = parser.parse_args(arguments)
    try:
        lines = repeat(given.bundle, given.allow)
    except SoftmodError as error:
        print(f"softmod: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    return 0


def repeat(folder: Path, allow: Sequence[str] = ()) -> list[str]:
    """Make the update again; what is not finite in what it was given, and in what came of it.

    Raises:
        CheckpointError: this is no bundle, or it is damaged.
        ConfigError: it is built of classes that are not allowed.
    """
    facts = checkpoint.verify(folder)
    if facts.get("kind") != KIND:
        raise CheckpointError(
            f"{folder}: not the bundle of a fault; a run names its own when it ends with code 6"
        )
    with checkpoint.reading(folder):
        return update_of(folder, facts, allow)


def update_of(folder: Path, facts: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """Repeat the update of a bundle and return what is not finite."""
    cfg = from_saved(facts["config"], allow)
    spec = spec_of(facts)
    cfg.fabric.compile = "eager"
    cfg.fabric.accelerator = "cpu"
    agent, optimizers = make_agent(
        cfg, spec, *networks(cfg, spec), make_fabric(cfg, facts.get("precision")), fused(cfg, facts)
    )
    checkpoint.restore_arrays(
        dict(agent.state_dict()), checkpoint.arrays(folder, "agent"), "network"
    )
    live = checkpoint.optimizer_arrays(optimizers)
    checkpoint.restore_arrays(live, checkpoint.arrays(folder, "optimizers"), "optimizers")
    given = checkpoint.arrays(folder, "given")
    agent.updates = facts["update"] - 1
    agent.draw()
    batch = Batch(*(given[name] for name in Batch._fields))
    metrics = agent.programs[agent.program(agent.updates)](
        batch, given["noise"], given["next_noise"]
    )
    finite = bool(metrics["finite"])
    told = [
        f"update {facts['update']:,} of seed {facts['seed']}:"
        f" {'finite here' if finite else 'not finite, as it was'}"
    ]
    told += [
        broken
        for name in Batch._fields
        for broken in by_task(f"batch, {name}", given[name], spec.tasks)
    ]
    told += [
        f"parameters, {name}"
        for name, tensor in agent.state_dict().items()
        if not tensor.isfinite().all()
    ]
    return told + [
        f"result, {name}: {value.tolist()}"
        for name, value in metrics.items()
        if not value.isfinite().all()
    ]


def by_task(what: str, values: Tensor, tasks: tuple[str, ...]) -> list[str]:
    """A line for each task with values `[task, batch, ...]` that are not finite."""
    broken = (~values.isfinite()).flatten(1).sum(1) if values.dim() > 1 else torch.zeros(len(tasks))
    return [
        f"{what}: {int(n)} not finite of {task}" for n, task in zip(broken, tasks, strict=True) if n
    ]


if __name__ == "__main__":
    sys.exit(main())
