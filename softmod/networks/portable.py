"""A policy for other programs: an ONNX file, or a program of `torch.export`.

Both map observations and task numbers to the deterministic actions. The normalization of
observations is part of them.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.errors import ConfigError
from softmod.networks.gaussian import Actor, actions

INPUTS = ("obs", "task")
OUTPUT = "action"
TASKS = "tasks"  # metadata of both files: names of the tasks by number, as a JSON list
ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages that writing and checking ONNX needs


class Portable(nn.Module):
    """A policy with a task for each row, so that a batch may mix tasks.

    Args:
        actor: the policy.
    """

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(
        self, obs: Float[Tensor, "row obs"], task: Int[Tensor, " row"]
    ) -> Float[Tensor, "row action"]:
        return actions(self.actor, obs.unsqueeze(1), task).squeeze(1)


def program(actor: Actor) -> torch.export.ExportedProgram:
    """Export a policy with `torch.export`, for batches of any size."""
    policy = Portable(actor).eval().requires_grad_(False)
    rows = torch.export.Dim("rows")
    example = (torch.zeros(2, actor.in_dim), torch.zeros(2, dtype=torch.int64))
    with quiet(), torch.no_grad():
        return torch.export.export(
            policy, example, dynamic_shapes={name: {0: rows} for name in INPUTS}
        )


def save_torch(actor: Actor, tasks: Sequence[str], path: Path) -> None:
    """Write a policy as a program that `torch.export.load` reads.

    Args:
        actor: the policy.
        tasks: names of its tasks, in order.
        path: of the file, which ends in `.pt2`.
    """
    torch.export.save(program(actor), path, extra_files={TASKS: json.dumps(list(tasks))})


def save_onnx(actor: Actor, tasks: Sequence[str], path: Path) -> None:
    """Write a policy as an ONNX file.

    Its inputs are `obs` `[rows, obs]` (float32) and `task` `[rows]` (int64), its output is
    `action` `[rows, action]` (float32). The key `tasks` of its metadata lists the tasks by number.

    Args:
        actor: the policy.
        tasks: names of its tasks, in order.
        path: of the file.

    Raises:
        ConfigError: the packages of the extra `export` are missing.
    """
    require(*ONNX)
    with quiet():
        made: Any = torch.onnx.export(
            program(actor), dynamo=True, verbose=False, output_names=[OUTPUT]
        )
        made.model.metadata_props[TASKS] = json.dumps(list(tasks))
        made.save(path)


def largest_difference(actor: Actor, path: Path, rows: int = 1000) -> float:
    """Return the largest difference between the actions of a policy and of its ONNX file.

    The observations are spread twice as widely as those that the policy was trained on; every task
    is among them.

    Args:
        actor: the policy.
        path: the ONNX file.
        rows: number of observations.

    Raises:
        ConfigError: the packages of the extra `export` are missing.
    """
    require(*ONNX)
    import onnxruntime

    draws = torch.Generator().manual_seed(0)
    obs = 2.0 * torch.randn(rows, actor.in_dim, generator=draws)
    if actor.normalizer is not None:
        obs = obs / actor.normalizer.scale + actor.normalizer.mean
    task = torch.arange(rows) % actor.num_tasks
    with torch.inference_mode():
        ours = Portable(actor).eval()(obs, task)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run([OUTPUT], {"obs": obs.numpy(), "task": task.numpy()})
    return float((ours - torch.from_numpy(theirs)).abs().max())


def require(*packages: str) -> None:
    """Check that packages of the extra `export` are installed.

    Raises:
        ConfigError: they are not; the message shows how to install them.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        install = f"pip install {' '.join(missing)}"
        raise ConfigError(f"{', '.join(missing)} {verb} not installed: {install}")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's remarks on its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
