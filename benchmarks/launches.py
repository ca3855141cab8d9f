"""The operations that an update launches on a GPU, counted without one.

An operation counts once, and so do a matrix product with a bias, an operation on a list of tensors
and a Triton kernel. Views and allocations launch nothing and are not counted. Of a compiled update,
what TorchInductor has fused into one node counts once, as it is one kernel on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softmod.agent import losses
from softmod.agent.replay import Replay
from softmod.agent.steps import FlatSteps
from softmod.capture.recorder import EMPTY, tensors
from softmod.config.compose import compose, typed
from softmod.config.schema import TrainConfig
from softmod.experiment.build import make_agent, networks
from softmod.spec import EnvSpec

EXPERIMENTS = ("mt10", "paper_mt10", "paper_mt50")
UPDATES = 50  # of a round
PER_GRAPH = (0, 10, 26, 50)
COMPILED = ("mt10", "paper_mt10")  # up to a minute each
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
FREE = (*EMPTY, torch.ops.aten._unsafe_view.default)  # besides views


class Launches(TorchDispatchMode):
    """A context that counts operations on CUDA and meta tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()  # of programs
        self.within: dict[str, Counter[str]] = {}  # operations, by program

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        used = tensors((*args, *(kwargs or {}).values(), output))
        if any(tensor.device.type in ("cuda", "meta") for tensor in used) and not _free(func):
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return output

    def program(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a program whose calls and operations are also counted by its name."""
        within = self.within[name] = Counter()

        def counted(*inputs: Any) -> Any:
            before = self.counts.copy()
            output = run(*inputs)
            within.update(self.counts - before)
            self.calls[name] += 1
            return output

        return counted

    def outside(self) -> float:
        """Return the operations outside of programs, per call of a program."""
        within = sum(counts.total() for counts in self.within.values())
        return (self.counts.total() - within) / self.calls.total()


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


def triton_steps(counted: Launches) -> ModuleType:
    """Return `softmod.kernels.triton_steps` with kernels that are counted and do nothing."""

    class Kernel:
        def __init__(self, function: Callable[..., None]) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: counted.counts.update([self.name])

    triton = MagicMock()
    triton.jit = Kernel
    spec = find_spec("softmod.kernels.triton_steps")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with patch.dict(sys.modules, {"triton": triton, "triton.language": triton.language}):
        spec.loader.exec_module(module)
    return module


@contextmanager
def as_on_cuda(counted: Launches, flat: bool) -> Iterator[None]:
    """Let meta tensors take the code paths of CUDA.

    Args:
        counted: counts the launches of Triton kernels.
        flat: whether steps are made on flat buffers; otherwise by PyTorch's optimizers.
    """
    with (
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        patch("softmod.agent.mtsac.torch_generator", lambda *_: torch.Generator()),
        patch("softmod.agent.losses.spread_by_adding", losses.spread_by_product),
        patch("softmod.capture.update_graph.is_cuda", lambda _: flat),
        patch("softmod.kernels.flat.triton_works", lambda _: True),
        patch.object(FlatSteps, "_by", triton_steps(counted)),  # else formulas, while counting
    ):
        yield


def launches(
    cfg: TrainConfig, spec: EnvSpec, updates: int, per_graph: int, flat: bool = True
) -> Launches:
    """Count the operations of one round of updates, drawn and made as on a GPU.

    Args:
        cfg: the configuration, in fp32 with `fabric.compile=eager`.
        spec: the task set.
        updates: updates of the round.
        per_graph: as in `fabric.updates_per_graph`; 0: with draws of torch's generators.
        flat: whether Triton kernels make the steps, on flat buffers, as on a GPU; otherwise
            PyTorch's optimizers do.
    """
    fabric: Any = OnMeta()
    counted = Launches()
    with as_on_cuda(counted, flat):
        agent, _ = make_agent(cfg, spec, *networks(cfg, spec), fabric, 0, per_graph)
        replay = Replay(spec, cfg.run.batch_per_task, fabric.device)
        replay.written = replay.capacity
        agent.learn(replay, updates)  # allocates what later rounds reuse
        counted.counts.clear()
        agent.programs = {name: counted.program(name, run) for name, run in agent.programs.items()}
        with counted:
            agent.learn(replay, updates)
    return counted


class FusedError(Exception):
    """Ends a compilation after fusion, before code is generated."""


def compiled(cfg: TrainConfig, spec: EnvSpec, programs: Sequence[str]) -> dict[str, Counter[str]]:
    """Count the kernels of programs with `fabric.compile=compiled`, by program and name.

    TorchInductor lowers and fuses them for the CPU.

    Args:
        cfg: the configuration, in fp32 with `fabric.compile=compiled`.
        spec: the task set.
        programs: of "whole" and "critics".
    """
    from torch._inductor import config
    from torch._inductor.exc import InductorError

    kernels: dict[str, Counter[str]] = {}

    def count(nodes: list[Any]) -> list[Any]:
        kernels[name] = Counter(filter(None, map(_kernel, nodes)))
        raise FusedError

    fabric = L.Fabric(accelerator="cpu", devices=1)
    with (
        patch("softmod.agent.losses.spread_by_adding", losses.spread_by_product),  # as on CUDA
        config.patch(_post_fusion_custom_pass=count, compile_threads=1),
    ):
        agent, _ = make_agent(cfg, spec, *networks(cfg, spec), fabric, 0)
        replay = Replay(spec, cfg.run.batch_per_task, fabric.device)
        replay.written = replay.capacity
        inputs = agent.prepare(agent.sample(replay))
        for name in programs:
            try:
                agent.programs[name](*inputs)
            except InductorError:
                if name not in kernels:
                    raise
    return kernels


def _kernel(node: Any) -> str:
    """Return the name of the kernel of a node of TorchInductor; empty if it launches none."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return ""
    if not node.is_extern():
        return "fused"
    return str(node.node.python_kernel_name).rpartition("kernels.")[2]


# --- tables ---------------------------------------------------------------------------------------


def table() -> list[dict[str, Any]]:
    """Return the operations of an update of some experiments, by the way to make it."""
    rows = []
    for experiment in EXPERIMENTS:
        cfg = on_gpu(f"experiment={experiment}")
        spec = spec_of(cfg)
        for per_graph in PER_GRAPH:
            drawn = f"{per_graph} per graph" if per_graph else "drawn on the host"
            if not per_graph:
                counted = launches(cfg, spec, UPDATES, 0, flat=False)
                rows.append(_row(f"{experiment}, steps of PyTorch, {drawn}", counted))
            counted = launches(cfg, spec, UPDATES, per_graph)
            rows.append(_row(f"{experiment}, {drawn}", counted))
    return rows


def compiled_table(per_graph: int = 26) -> list[dict[str, Any]]:
    """Return the kernels of an update compiled as a whole, for some experiments."""
    rows = []
    for experiment in COMPILED:
        cfg = on_gpu(f"experiment={experiment}")
        spec = spec_of(cfg)
        counted = launches(cfg, spec, UPDATES, per_graph)  # what is outside is not compiled
        cfg.fabric.compile = "compiled"
        programs = compiled(cfg, spec, list(counted.calls))
        rows.append(_row(f"{experiment}, compiled, {per_graph} per graph", counted, programs))
    return rows


def _row(
    what: str, counted: Launches, compiled: dict[str, Counter[str]] | None = None
) -> dict[str, Any]:
    """Return a row with the operations of a call of each program, and of an update on average.

    Args:
        what: its title.
        counted: the operations of a round.
        compiled: the kernels of a call of each program instead of its operations.
    """
    row: dict[str, Any] = {"what": what}
    outside = counted.outside()
    mean = outside
    for name, title in (("whole", "whole update"), ("critics", "critics only")):
        calls = counted.calls[name]
        if not calls:
            continue
        counts = counted.within[name] if compiled is None else compiled[name]
        per = calls if compiled is None else 1
        row[title] = counts.total() / per
        row[f"{title}: products"] = sum(counts[product] for product in PRODUCTS) / per
        mean += row[title] * calls / counted.calls.total()
    return row | {"outside": outside, "an update": mean}


def spec_of(cfg: TrainConfig) -> EnvSpec:
    """Return the tasks and sizes of a configuration with Meta-World's tasks."""
    return EnvSpec(tuple(cfg.env.tasks), 39, 4, 500, cfg.env.train_horizon, 18)


def on_gpu(*overrides: str) -> TrainConfig:
    """Return a configuration whose updates can be counted."""
    return typed(compose([*overrides, "fabric.compile=eager", "fabric.precision=32-true"]))
