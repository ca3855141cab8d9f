"""`python -m softmod.replay_fault <bundle>`: repeat the update that ended a run.

It lists the tensors that are not finite. A run writes a bundle when its updates stay non-finite:
parameters, optimizers, the batch and the noise. The running statistics in it (normalized
observations, scaled rewards) are those of the end of the round.
"""

from __future__ import annotations

import argparse
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
from softmod.system.streams import complain, exit_with


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return an exit code of docs/exit_codes.md."""
    parser = argparse.ArgumentParser(prog="python -m softmod.replay_fault", description=__doc__)
    parser.add_argument("bundle", type=Path, help="the folder that the run printed when it ended")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package of your own that the configuration may name",
    )
    given = parser.parse_args(arguments)
    try:
        lines = repeat(given.bundle, given.allow)
    except SoftmodError as error:
        complain(f"softmod: {error}")
        return error.exit_code
    print("\n".join(lines))
    return 0


def repeat(folder: Path, allow: Sequence[str] = ()) -> list[str]:
    """Repeat the update of a bundle and list inputs, parameters and results that are not finite.

    Args:
        folder: The bundle.
        allow: Packages of the user that the configuration may name.

    Raises:
        CheckpointError: The folder is not a bundle, or it is damaged.
        ConfigError: The configuration names classes that are not allowed.
    """
    metadata = checkpoint.verify(folder)
    if metadata.get("kind") != KIND:
        raise CheckpointError(
            f"{folder}: not the bundle of a fault; a run that ends with code 6 prints its path"
        )
    with checkpoint.reading(folder):
        return update_of(folder, metadata, allow)


def update_of(folder: Path, metadata: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """Repeat the update of a bundle and list what is not finite, given its metadata."""
    cfg = from_saved(metadata["config"], allow)
    spec = spec_of(metadata)
    cfg.fabric.compile = "eager"
    cfg.fabric.accelerator = "cpu"
    agent, optimizers = make_agent(
        cfg,
        spec,
        *networks(cfg, spec),
        make_fabric(cfg, metadata.get("precision")),
        fused(cfg, metadata),
        int(metadata.get("updates_per_graph") or 0),
    )
    checkpoint.restore_arrays(
        dict(agent.state_dict()), checkpoint.arrays(folder, "agent"), "network"
    )
    live = checkpoint.optimizer_arrays(optimizers)
    checkpoint.restore_arrays(live, checkpoint.arrays(folder, "optimizers"), "optimizers")
    given = checkpoint.arrays(folder, "given")
    agent.updates = metadata["update"] - 1
    agent.draw()
    batch = Batch(*(given[name] for name in Batch._fields))
    metrics = agent.programs[agent.program(agent.updates)](
        batch, given["noise"], given["next_noise"]
    )
    finite = bool(metrics["finite"])
    lines = [
        f"update {metadata['update']:,} of seed {metadata['seed']}:"
        f" {'finite here' if finite else 'not finite, as it was'}"
    ]
    for name in Batch._fields:
        lines += by_task(f"batch, {name}", given[name], spec.tasks)
    for name, tensor in agent.state_dict().items():
        if not tensor.isfinite().all():
            lines.append(f"parameters, {name}")
    for name, value in metrics.items():
        if not value.isfinite().all():
            lines.append(f"result, {name}: {value.tolist()}")
    return lines


def by_task(what: str, values: Tensor, tasks: tuple[str, ...]) -> list[str]:
    """Count the non-finite values `[task, batch, ...]` per task; return a line for each task."""
    broken = (~values.isfinite()).flatten(1).sum(1) if values.dim() > 1 else torch.zeros(len(tasks))
    return [
        f"{what}: {int(n)} not finite of {task}" for n, task in zip(broken, tasks, strict=True) if n
    ]


if __name__ == "__main__":
    exit_with(main)
