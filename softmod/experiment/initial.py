"""Trained weights that a run starts from (`init_from`)."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmod.agent.mtsac import MTSAC
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.load import find, spec_of
from softmod.config.schema import TrainConfig
from softmod.errors import CheckpointError, ConfigError
from softmod.experiment.build import networks
from softmod.spec import EnvSpec
from softmod.system.files import digest

REPORT = "init_from.json"  # in the run's folder: every array, and what became of it
ROLES = ("actor.", "averaged_actor.", "critic.", "target_critic.", "moments.")
COPIES = (  # arrays of a role that a checkpoint may lack, and those that stand for them
    ("actor.", "averaged_actor."),
    ("averaged_actor.", "actor."),
    ("target_critic.", "critic."),
)
DIGITS = 16
PREFIX = "sha"  # so that a hash is never read as a number
SHOWN = 6  # arrays that are listed on the terminal


@dataclasses.dataclass
class Taken:
    """Arrays by name, and what became of them."""

    whole: list[str] = dataclasses.field(default_factory=list)  # taken
    by_task: list[str] = dataclasses.field(default_factory=list)  # taken for the shared tasks
    shared: list[str] = dataclasses.field(default_factory=list)  # tasks of both
    other_shape: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)  # both shapes
    missing: list[str] = dataclasses.field(default_factory=list)  # in the checkpoint
    unused: list[str] = dataclasses.field(default_factory=list)  # of the checkpoint

    def lines(self) -> Iterator[str]:
        """Yield what to print: numbers of arrays, and those that do not fit with their shapes."""
        roles = Counter(name.partition(".")[0] for name in (*self.whole, *self.by_task))
        numbers = ", ".join(f"{count} of {role}" for role, count in roles.items())
        shared = f"; rows of {len(self.shared)} shared tasks" if self.by_task else ""
        yield f"arrays taken: {numbers or 'none'}{shared}"
        apart = [
            f"{name} {theirs}, here {ours}" for name, (theirs, ours) in self.other_shape.items()
        ]
        for kind, names in (
            ("another shape", apart),
            ("not in the checkpoint", self.missing),
            ("not in this run", self.unused),
        ):
            if names:
                more = f", and {len(names) - SHOWN} more ({REPORT})" if len(names) > SHOWN else ""
                yield f"not taken, {kind}: {'; '.join(names[:SHOWN])}{more}"


def pinned(cfg: TrainConfig) -> TrainConfig:
    """Fill in the hash of the weights that a run starts from.

    A run that is resumed does not need the weights again: with `init_digest`, they may be gone.

    Raises:
        ConfigError: there are no such weights, or they have another hash.
    """
    if cfg.init_from is None:
        if cfg.init_digest is not None:
            raise ConfigError(f"init_digest={cfg.init_digest}: only with init_from")
        return cfg
    try:
        folder = find(Path(cfg.init_from))[0]
        found = PREFIX + digest(folder / "agent.safetensors")[:DIGITS]
    except (CheckpointError, OSError) as error:
        if cfg.init_digest is not None:
            return cfg
        raise ConfigError(f"init_from={error}") from error
    if cfg.init_digest not in (None, found):
        raise ConfigError(
            f"init_digest={cfg.init_digest}: the weights in init_from={cfg.init_from} have {found}"
        )
    return dataclasses.replace(cfg, init_digest=found)


def initialize(cfg: TrainConfig, agent: MTSAC, folder: Path) -> Taken:
    """Copy the weights of `init_from` into an agent, as far as they fit; write `REPORT`.

    Arrays fit if name and shape are equal. Of arrays with a row for each task, the rows of tasks
    with the same name are taken. Temperatures, return scales and success rates start anew.

    Args:
        cfg: configuration of the run.
        agent: overwritten in place.
        folder: the run's folder.

    Raises:
        CheckpointError: the weights cannot be read.
        SaveError: `REPORT` cannot be written.
    """
    source, metadata = find(Path(str(cfg.init_from)))
    with checkpoint.reading(source):
        saved = with_copies(checkpoint.arrays(source, "agent"))
        theirs = spec_of(metadata).tasks
    taken = take(agent, saved, theirs, task_axes(cfg, agent.spec))
    with checkpoint.writing(folder / REPORT):
        (folder / REPORT).write_text(
            json.dumps(dataclasses.asdict(taken), indent=1), encoding="utf-8"
        )
    return taken


def with_copies(saved: checkpoint.Arrays) -> checkpoint.Arrays:
    """Return arrays of a checkpoint with those that its other arrays stand for."""
    whole = dict(saved)
    for role, other in COPIES:
        if not any(name.startswith(role) for name in saved):
            whole |= {
                role + name.removeprefix(other): array
                for name, array in saved.items()
                if name.startswith(other)
            }
    return whole


def task_axes(cfg: TrainConfig, spec: EnvSpec) -> dict[str, int]:
    """Return the axis of each array of the networks that has a row for each task.

    It is the axis that grows in networks for one more task.
    """
    more = dataclasses.replace(spec, tasks=(*spec.tasks, "one more"))
    found: dict[str, int] = {}
    for role, network, larger in zip(
        ("actor", "critic"), networks(cfg, spec), networks(cfg, more), strict=True
    ):
        shapes = {name: array.shape for name, array in larger.state_dict().items()}
        for name, array in network.state_dict().items():
            for axis, (size, grown) in enumerate(zip(array.shape, shapes[name], strict=True)):
                if size != grown:
                    found[f"{role}.{name}"] = axis
    twins = {f"averaged_{name}": axis for name, axis in found.items() if name[0] == "a"}
    targets = {f"target_{name}": axis for name, axis in found.items() if name[0] == "c"}
    return found | twins | targets


@torch.no_grad()
def take(
    agent: Any, saved: checkpoint.Arrays, theirs: Sequence[str], axes: dict[str, int]
) -> Taken:
    """Copy the arrays that fit, in place.

    Args:
        agent: overwritten.
        saved: arrays of the checkpoint.
        theirs: its tasks.
        axes: axis of the tasks, for arrays that have one.
    """
    tasks = list(agent.spec.tasks)
    taken = Taken(shared=[task for task in tasks if task in theirs])
    live = {name: a for name, a in agent.state_dict().items() if name.startswith(ROLES)}
    taken.unused = [name for name in saved if name.startswith(ROLES) and name not in live]
    for name, array in live.items():
        axis = axes.get(name)
        if name not in saved:
            taken.missing.append(name)
        elif axis is not None and same_rows(array, len(tasks), saved[name], len(theirs), axis):
            if taken.shared:
                copy_rows(array, tasks, saved[name], theirs, axis)
                taken.by_task.append(name)
            else:
                taken.missing.append(name)
        elif axis is None and array.shape == saved[name].shape:
            array.copy_(saved[name])
            taken.whole.append(name)
        else:
            taken.other_shape[name] = [list(saved[name].shape), list(array.shape)]
    return taken


def same_rows(ours: Tensor, number: int, theirs: Tensor, their_number: int, axis: int) -> bool:
    """Return whether two arrays have rows of equal shapes for each of their tasks."""
    expected = list(ours.shape)
    expected[axis] = ours.shape[axis] // number * their_number
    return list(theirs.shape) == expected


def copy_rows(
    ours: Tensor, tasks: Sequence[str], saved: Tensor, theirs: Sequence[str], axis: int
) -> None:
    """Copy the rows of the tasks that both have; an axis may hold a stack of rows per task."""
    shared = [task for task in tasks if task in theirs]
    to = torch.tensor([tasks.index(task) for task in shared], device=ours.device)
    rows = saved.unflatten(axis, (-1, len(theirs))).index_select(
        axis + 1, torch.tensor([list(theirs).index(task) for task in shared])
    )
    ours.unflatten(axis, (-1, len(tasks))).index_copy_(axis + 1, to, rows.to(ours.device))
