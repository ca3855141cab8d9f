"""The operations that an update launches on a GPU, counted without one, on meta tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softmod.agent import losses
from softmod.agent.replay import Replay
from softmod.capture.recorder import EMPTY, tensors
from softmod.config.compose import compose, typed
from softmod.config.schema import TrainConfig
from softmod.experiment.build import make_agent, networks
from softmod.spec import EnvSpec

EXPERIMENTS = ("mt10", "paper_mt10", "paper_mt50")
UPDATES = 50  # of a round
PER_GRAPH = (0, 10, 26, 50)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
FREE = (*EMPTY, torch.ops.aten._unsafe_view.default)  # besides views


class Launches(TorchDispatchMode):
    """A context that counts operations on CUDA and meta tensors by name.

    Views and allocations launch nothing and are not counted. An operation on a list of tensors
    counts once, and so does a fused optimizer's step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        used = tensors((*args, *(kwargs or {}).values(), output))
        if any(tensor.device.type in ("cuda", "meta") for tensor in used) and not _free(func):
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return output


def _free(func: Any) -> bool:
    """Return whether an operation only returns views or unwritten memory."""
    returned = func._schema.returns
    views = bool(returned) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returned
    )
    return views or func in FREE


class OnMeta:
    """Stands in for a Fabric on a GPU: meta tensors have shapes only and take its code paths.

    Reading a value, for which a GPU would have to wait, raises an error.
    """

    device = torch.device("meta")

    def to_device(self, module: Any) -> Any:
        """Move a module."""
        return module.to(self.device)

    def setup(self, module: Any, *optimizers: Any) -> Any:
        """Wrap module and optimizers as Fabric does."""
        fabric = L.Fabric(accelerator="cpu", devices=1)
        return fabric.setup(module, *optimizers, move_to_device=False)


def launches(cfg: TrainConfig, spec: EnvSpec, updates: int, per_graph: int) -> Counter[str]:
    """Count the operations of one round of updates, drawn and made as on a GPU, by name.

    Args:
        cfg: the configuration, in fp32 with `fabric.compile=eager`.
        spec: the task set.
        updates: updates of the round.
        per_graph: as in `fabric.updates_per_graph`; 0: with draws of torch's generators.
    """
    fabric: Any = OnMeta()
    with (
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        patch("softmod.agent.mtsac.torch_generator", lambda *_: torch.Generator()),
        patch("softmod.agent.losses.spread_by_adding", losses.spread_by_product),  # as on CUDA
    ):
        agent, _ = make_agent(cfg, spec, *networks(cfg, spec), fabric, 0, per_graph)
        replay = Replay(spec, cfg.run.batch_per_task, fabric.device)
        replay.written = replay.capacity
        agent.learn(replay, updates)  # allocates what later rounds reuse
        with Launches() as counted:
            agent.learn(replay, updates)
    return counted.counts


def table() -> list[dict[str, Any]]:
    """Return the operations per update of some experiments, by updates per graph."""
    rows = []
    for experiment in EXPERIMENTS:
        cfg = on_gpu(f"experiment={experiment}")
        spec = EnvSpec(tuple(cfg.env.tasks), 39, 4, 500, cfg.env.train_horizon, 18)
        for per_graph in PER_GRAPH:
            counts = launches(cfg, spec, UPDATES, per_graph)
            drawn = f"{per_graph} per graph" if per_graph else "drawn on the host"
            rows.append(
                {
                    "what": f"{experiment}, {drawn}",
                    "operations": counts.total() / UPDATES,
                    "products": sum(counts[name] for name in PRODUCTS) / UPDATES,
                }
            )
    return rows


def on_gpu(*overrides: str) -> TrainConfig:
    """Return a configuration whose updates can be counted."""
    return typed(compose([*overrides, "fabric.compile=eager", "fabric.precision=32-true"]))
