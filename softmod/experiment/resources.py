"""Hardware resources of a run: device, precision, kernels, processes and threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from softmod import kernels
from softmod.agent.replay import Replay, random_rollout
from softmod.config.identity import identity
from softmod.config.schema import TrainConfig
from softmod.experiment.autotune import (
    MEASURED_ROUNDS,
    MEASURED_TASKS,
    Chosen,
    Costs,
    Round,
    best,
    cached_choice,
    thread_counts,
    timed,
)
from softmod.experiment.build import OPTIMIZERS, make_agent, networks
from softmod.experiment.checks import obstacle
from softmod.spec import TaskSuite
from softmod.system import environment
from softmod.system.hardware import available, hardware_tags
from softmod.system.libraries import fast_products, keep_memory, multiplies_bf16, product_library
from softmod.system.user import cache_folder, ensure_identity
from softmod.workers.process import may_start_processes, start_worker
from softmod.workers.worker import Plan

PER_GRAPH = 25  # updates per CUDA graph; a round of the recipe makes 25, a published one 50
PLAYED = 0.5  # estimated share of an evaluation's steps that is played: episodes end at success


@dataclass(frozen=True)
class Resources:
    """Resources that a run uses on this machine.

    Attributes:
        fabric: device of the learner.
        precision: precision of the networks, as in `fabric.precision`.
        fused: the version of the fused operations that updates use; 0: none.
        processes: worker processes; 0: inline.
        threads: threads of the learner.
        per_graph: updates per chunk, with draws on the device; 0: draws on the host.
        before: resources stored in the checkpoint that the run resumes from; empty for a new run.
    """

    fabric: L.Fabric
    precision: str
    fused: int
    processes: int
    threads: int
    per_graph: int
    before: Mapping[str, Any]

    @property
    def device(self) -> str:
        """Return the name of the GPU; "none" on a CPU."""
        if self.fabric.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.fabric.device))
        return "none"

    @property
    def in_turns(self) -> bool:
        """Return whether workers collect before the learner learns, rather than meanwhile."""
        on_cpu = self.fabric.device.type == "cpu"
        return on_cpu and Chosen(self.processes, self.threads).in_turns()

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the resources, so that a resumed run reuses them."""
        return {
            "processes": self.processes,
            "threads": self.threads,
            "precision": self.precision,
            "fused": kernels.key(self.fused) if self.fused else self.before.get("fused"),
            "kernels": self.fused or self.before.get("kernels"),
            "updates_per_graph": self.per_graph,
        }

    def tags(self) -> dict[str, str]:
        """Return the tags of the machine and of the chosen resources."""
        return hardware_tags(self.device) | {
            "machine.worker_processes": str(self.processes),
            "machine.threads": str(self.threads),
            "machine.precision": self.precision,
            "machine.kernels": "fused" if self.fused else "none",
        }

    def describe(self) -> str:
        """Return the resources in words, for the terminal."""
        where = f"{self.processes} worker processes" if self.processes else "workers inline"
        by = product_library() if self.device == "none" else self.device
        own = ", fused kernels" if self.fused else ""
        if self.per_graph:
            own += f", {self.per_graph} updates per graph"
        on = self.fabric.device
        return f"{where}, {self.threads} threads on {on} ({by}, {self.precision}{own})"

    def differences(self) -> list[str]:
        """Return warnings about resources that changed since the checkpoint and affect rounding."""
        lines = []
        threads = self.before.get("threads", self.threads)
        if threads != self.threads:
            lines.append(f"this run used {threads} threads and continues with {self.threads}")
        kept = self.before.get("fused")
        if kept and kept != (kernels.key(self.fused) if self.fused else None):
            how = "other fused kernels" if self.fused else "none"
            lines.append(f"this run used fused kernels and continues with {how}")
        return [f"{line}: results differ by rounding" for line in lines]


def claim(cfg: TrainConfig, suite: TaskSuite, before: Mapping[str, Any], beside: bool) -> Resources:
    """Choose the resources of a run, and set up libraries and threads accordingly.

    Args:
        cfg: configuration of the run.
        suite: its task set; its steps are timed if processes or threads are to be chosen.
        before: resources stored in the checkpoint; empty for a new run.
        beside: the run learns together with other runs in this process.

    Raises:
        WorkerError: timing failed, because the environments cannot be built or stepped.
    """
    wanted = precision(cfg, before)
    use_kernels = fused(cfg, before)
    fabric = make_fabric(cfg, wanted)
    set_up(cfg, fabric.device)
    chosen = beside_others(cfg, before) if beside else choose(cfg, suite, before)
    torch.set_num_threads(chosen.threads)
    per_graph = updates_per_graph(cfg, before)
    return Resources(
        fabric, wanted, use_kernels, chosen.processes, chosen.threads, per_graph, before
    )


def set_up(cfg: TrainConfig, device: torch.device) -> None:
    """Set up the C library's memory, the matrix products and their precision for the learner."""
    ensure_identity()
    keep_memory()
    if device.type == "cpu":
        fast_products()
        return
    torch.set_float32_matmul_precision("high" if cfg.fabric.precision == "tf32" else "highest")
    if cfg.fabric.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def precision(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the precision of the networks: as configured, as `before`, or the machine's default.

    The default is bf16-mixed on a CPU that multiplies bfloat16 in hardware, 32-true elsewhere.
    """
    if cfg.fabric.precision != "auto":
        return cfg.fabric.precision
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    default = "bf16-mixed" if not on_cuda and multiplies_bf16() else "32-true"
    return str(before.get("precision", default))


def fused(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Return the version of the fused operations that updates use; 0 if they use none.

    They use some on a CPU, if they compile, `fabric.kernels` is not off and `fabric.precision` not
    bf16: the newest version in a new run, and in a resumed run the version used `before`, if any.
    """
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    if cfg.fabric.kernels == "off" or cfg.fabric.precision == "bf16" or on_cuda:
        return 0
    if not before:
        return kernels.newest()
    version = int(before.get("kernels") or kernels.NORM)  # the first had no number
    return version if before.get("fused") and kernels.available(version) else 0


def updates_per_graph(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Return the updates per chunk; 0 if batches and noise are drawn on the host.

    A resumed run draws as it did `before` (see `softmod.experiment.resume.check_draws`). A new run
    draws on the device if its updates are CUDA graphs.
    """
    if cfg.fabric.updates_per_graph is not None:
        return cfg.fabric.updates_per_graph
    if before:
        return int(before.get("updates_per_graph") or 0)
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    optimizers = (getattr(cfg.optimizer, name) for name in OPTIMIZERS)
    fused_steps = all(getattr(optimizer, "fused", False) for optimizer in optimizers)
    if not on_cuda or cfg.fabric.compile == "eager" or not fused_steps or obstacle(cfg):
        return 0
    delay = cfg.algorithm.policy_delay
    return -(-PER_GRAPH // delay) * delay


def make_fabric(cfg: TrainConfig, wanted: str | None = None) -> L.Fabric:
    """Build the learner's Fabric: one device, in the wanted precision (None: as `precision`)."""
    wanted = wanted or precision(cfg)
    of_fabric: Any = "32-true" if wanted in ("tf32", "bf16") else wanted
    for name in ("lightning.fabric", "lightning.pytorch"):  # silence advice on the precision
        logging.getLogger(name).setLevel(logging.WARNING)
    # Fabric would prefer LT_PRECISION and its like, which its command line sets, to arguments.
    of_lightning = {name: None for name in os.environ if name.startswith("LT_")}
    with environment.changed(of_lightning):
        return L.Fabric(
            accelerator=cfg.fabric.accelerator,
            devices=1,
            precision=of_fabric,
            plugins=[
                LightningEnvironment()
            ],  # ignore the environment variables of a cluster's launcher
        )


def choose(
    cfg: TrainConfig, suite: TaskSuite, before: Mapping[str, Any] = MappingProxyType({})
) -> Chosen:
    """Choose processes and threads: as configured, as `before`, or the fastest measured ones.

    A resumed run keeps its numbers, because bitwise reproducibility depends on them.

    Raises:
        WorkerError: timing failed, because the environments cannot be built or stepped.
    """
    processes = wanted_processes(cfg, before)
    threads = cfg.fabric.threads or before.get("threads")
    if processes is not None and threads:
        return Chosen(processes, threads)
    steps = cfg.run.round_steps * cfg.workers.copies
    environments = suite.spec.num_tasks * cfg.workers.copies
    env_steps = steps * suite.spec.num_tasks
    episodes = cfg.run.eval_goals * suite.spec.num_tasks
    evaluated = env_steps * episodes * suite.spec.horizon * PLAYED / cfg.run.eval_every
    wanted = Round(steps * cfg.run.update_ratio, env_steps, environments, evaluated)
    settings = {"identity": identity(cfg), "processes": processes, "threads": threads} | {
        "accelerator": cfg.fabric.accelerator,
        "evaluated": evaluated,
        "torch": torch.__version__,
        "products": product_library(),
        "precision": precision(cfg),
        "fused": fused(cfg),
    }
    if per_graph := updates_per_graph(cfg):
        settings["updates_per_graph"] = per_graph
    return cached_choice(
        cache_folder(),
        settings,
        lambda: measure(cfg, suite, processes, threads),
        lambda costs: best(costs, wanted, processes, threads),
    )


def beside_others(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> Chosen:
    """Choose processes and threads of a run that learns together with others in this process.

    It gets one worker process if there is more than one core. The group of runs shares the
    learner's threads, so each run counts one.
    """
    processes = wanted_processes(cfg, before)
    spare = 1 if available() > 1 else 0
    return Chosen(spare if processes is None else processes, 1)


def wanted_processes(cfg: TrainConfig, before: Mapping[str, Any]) -> int | None:
    """Return the worker processes as configured, or as `before`; None if neither has a number.

    Without a configured number there are none if this process may not start any.
    """
    if cfg.workers.processes is not None:
        return cfg.workers.processes
    return before.get("processes") if may_start_processes() else 0


def measure(
    cfg: TrainConfig, suite: TaskSuite, processes: int | None, threads: int | None
) -> Costs:
    """Time updates for several numbers of threads, and env steps in a worker.

    Both use an agent and a worker made for this purpose. On a GPU the learner needs one thread.

    Raises:
        WorkerError: the environments cannot be built or stepped.
    """
    per_graph = updates_per_graph(cfg)
    agent, _ = make_agent(
        cfg, suite.spec, *networks(cfg, suite.spec), make_fabric(cfg), fused(cfg), per_graph
    )
    replay = Replay(suite.spec, cfg.run.batch_per_task, agent.device)
    replay.extend(random_rollout(suite.spec, replay.capacity))
    update: dict[int, float] = {}
    # A cycle of this many updates includes an actor update.
    cycle = per_graph or cfg.algorithm.policy_delay
    if threads:
        counts = [threads]
    elif agent.device.type == "cpu":
        counts = thread_counts()
    else:
        counts = [1]
    for count in counts:
        torch.set_num_threads(count)
        update[count] = timed(lambda: float(agent.learn(replay, cycle)["finite"])) / cycle
    torch.set_num_threads(1)
    plan = Plan(suite, agent.actor.cpu(), cfg.seed)
    tasks = list(range(min(MEASURED_TASKS, suite.spec.num_tasks)))
    with closing(
        start_worker(plan, tasks, [0], True, cfg.workers.timeout, inline=processes == 0)
    ) as worker:
        seconds = []
        for _ in range(MEASURED_ROUNDS):
            worker.ask("collect", cfg.run.round_steps)
            seconds.append(worker.answer().seconds)
    step = min(seconds) / (cfg.run.round_steps * len(tasks))
    return Costs(update, step)
