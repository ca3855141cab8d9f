"""Cost of a model: parameters, and floating-point operations of one update, both counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from softmod.agent.replay import Batch
from softmod.config.compose import compose, from_saved
from softmod.config.instantiate import build
from softmod.config.schema import TrainConfig
from softmod.errors import SoftmodError
from softmod.experiment.build import make_agent, networks
from softmod.experiment.resources import make_fabric
from softmod.report.runs import Run
from softmod.spec import EnvSpec, TaskSuite

logger = logging.getLogger(__name__)


class Cost(NamedTuple):
    """Cost of a model and its algorithm on a task set."""

    actor: int  # parameters
    critics: int  # parameters of both critics, without targets
    gflop: float  # of one update, forward and backward, matrix products only


def of_run(run: Run, allow: Sequence[str] = ()) -> Cost | None:
    """Return the cost of a run, or None with a warning if its networks cannot be built."""
    try:
        saved = nested(run.config)
        saved.setdefault("tracking", journal_only())
        cfg = from_saved(saved, allow)
        suite: TaskSuite = build(cfg.env, "env")
        return of(cfg, suite.spec)
    except SoftmodError as error:
        logger.warning("%s: parameters and FLOP are left out (%s)", run.source, error)
        return None


def of(cfg: TrainConfig, spec: EnvSpec) -> Cost:
    """Count the cost by running one update on random data, on the CPU."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cfg.fabric.compile = "eager"
    cfg.fabric.accelerator = "cpu"
    agent, _ = make_agent(cfg, spec, *networks(cfg, spec), make_fabric(cfg, "32-true"), fused=0)
    rows = (spec.num_tasks, cfg.run.batch_per_task)
    obs, next_obs = torch.randn(2, *rows, spec.obs_dim)
    action, noise, next_noise = torch.randn(3, *rows, spec.action_dim)
    with Counter() as counter:
        agent.update(
            Batch(obs, action.tanh(), torch.randn(rows), next_obs, torch.full(rows, 0.99)),
            noise,
            next_noise,
        )
    return Cost(agent.actor.num_parameters(), agent.critic.num_parameters(), counter.flop / 1e9)


class Counter(TorchDispatchMode):
    """Counter of floating-point operations, by PyTorch's formulas for matrix products.

    Elementwise operations are not counted. PyTorch's `FlopCounterMode` also tracks modules, and
    fails on `torch.autograd.grad` of their parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


def journal_only() -> Any:
    """Return `tracking=journal`, because saved results do not keep `tracking`."""
    return OmegaConf.to_container(compose(["tracking=journal"]).tracking, resolve=True)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested mappings."""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = made
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return made
