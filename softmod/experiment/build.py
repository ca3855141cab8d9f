"""What a run is built of: tasks, networks, agent, and how many processes and threads it gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import lightning as L
import psutil
import torch
from torch.optim import Optimizer

from softmod import kernels
from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import Replay, bytes_per_transition, random_rollout
from softmod.agent.value_heads import ValueHead
from softmod.capture.update_graph import run_programs
from softmod.config.identity import identity
from softmod.config.instantiate import build, resolve_target, target_of
from softmod.config.schema import TrainConfig
from softmod.errors import ConfigError
from softmod.experiment.autotune import (
    MEASURED_ROUNDS,
    MEASURED_TASKS,
    Chosen,
    Costs,
    Round,
    best,
    remembered,
    thread_counts,
    timed,
)
from softmod.networks.build import build_actor
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.seeding import Purpose, sequence
from softmod.spec import EnvSpec, TaskSuite
from softmod.system.hardware import available, cache_folder
from softmod.system.libraries import fast_products, keep_memory, multiplies_bf16, product_library
from softmod.workers.process import start_worker
from softmod.workers.worker import Plan

PLAYED = (
    0.5  # share of an evaluation's steps that is played: a guess, since an episode ends at success
)


def assemble(cfg: TrainConfig) -> tuple[TaskSuite, Actor, Network]:
    """The task set, its goals drawn, and the networks: what can be wrong with a configuration shows
    here.

    Raises:
        ConfigError: a class is not where `_target_` says, is of another kind, or does not take the
            options.
    """
    suite: TaskSuite = build(cfg.env, "env")
    check_suite(cfg, suite)
    for task in range(suite.spec.num_tasks):
        suite.goals(task)  # now, so that no worker draws them anew
    check_value_head(cfg)
    actor, critic = networks(cfg, suite.spec)
    check_memory(cfg, suite.spec)
    for name in ("actor", "critic", "temperature"):
        key, params = f"optimizer.{name}", [torch.zeros(1, requires_grad=True)]
        check_capture(cfg, build(getattr(cfg.optimizer, name), key, Optimizer, params=params), key)
    check_surgery(cfg, actor, critic)
    resolve_target(cfg.algorithm._target_, "algorithm", MTSAC)
    return suite, actor, critic


def networks(cfg: TrainConfig, spec: EnvSpec) -> tuple[Actor, Network]:
    """Actor and twin critics, their start values drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(sequence(cfg.seed, Purpose.NETWORKS).generate_state(1)[0]))
        actor = build_actor(cfg.actor, cfg.policy.log_std, cfg.policy.normalize_obs, spec)
        outputs = value_head(cfg).outputs
        sizes = {
            "in_dim": spec.obs_dim + spec.action_dim,
            "out_dim": outputs,
            "num_tasks": spec.num_tasks,
        }
        critic: Network = build(cfg.critic, "critic", Network, **sizes, stack=2)
    return actor, critic


def value_head(cfg: TrainConfig) -> ValueHead:
    """Build the value head, which says what the critics' outputs mean."""
    head: ValueHead = build(cfg.critic_head, "critic_head", ValueHead)
    return head


def make_plan(cfg: TrainConfig, suite: TaskSuite, actor: Actor) -> Plan:
    """Say what the workers step, with a copy of the policy of their own, and how they explore."""
    pink = cfg.policy.exploration_noise == "pink"
    return Plan(
        suite, deepcopy(actor), cfg.seed, draw_goals=cfg.env.goals == "random", pink_noise=pink
    )


def set_up(cfg: TrainConfig, device: torch.device) -> None:
    """Set up the libraries under the learner: memory, matrix products and their precision."""
    keep_memory()
    if device.type == "cpu":
        fast_products()
        return
    torch.set_float32_matmul_precision("high" if cfg.fabric.precision == "tf32" else "highest")
    if cfg.fabric.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def precision(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the precision of the networks: as asked for, else as the run had it `before`, else
    what suits the machine.

    That is bf16-mixed on a processor that multiplies bfloat16 itself, 32-true elsewhere.
    """
    if cfg.fabric.precision != "auto":
        return cfg.fabric.precision
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    suits = "bf16-mixed" if not on_cuda and multiplies_bf16() else "32-true"
    return str(before.get("precision", suits))


def fused(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether updates use fused operations: if they are not off, the run had them `before`,
    and they compile.
    """
    if cfg.fabric.kernels == "off" or (
        cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    ):
        return False
    return bool(before.get("fused", not before)) and kernels.available()


def make_fabric(cfg: TrainConfig, wanted: str | None = None) -> L.Fabric:
    """Make the Fabric that the learner runs on: one device, in the wanted precision (None: the
    configuration's).
    """
    wanted = wanted or precision(cfg)
    of_fabric: Any = "32-true" if wanted == "tf32" else wanted
    for name in (
        "lightning.fabric",
        "lightning.pytorch",
    ):  # advice on a precision that the user has chosen
        logging.getLogger(name).setLevel(logging.WARNING)
    return L.Fabric(accelerator=cfg.fabric.accelerator, devices=1, precision=of_fabric)


def make_agent(
    cfg: TrainConfig,
    spec: EnvSpec,
    actor: Actor,
    critic: Network,
    fabric: L.Fabric,
    use_kernels: bool | None = None,
) -> tuple[MTSAC, list[Any]]:
    """Make the agent on the learner's device, and its optimizers; it uses fused operations as said,
    or by `fused`.
    """

    def maker(name: str) -> Any:
        return lambda parameters: build(
            getattr(cfg.optimizer, name), f"optimizer.{name}", Optimizer, params=parameters
        )

    optimizers = {name: maker(name) for name in ("actor", "critic", "temperature")}
    agent: MTSAC = build(
        cfg.algorithm, "algorithm", MTSAC, spec=spec, actor=actor, critic=critic,
        optimizers=optimizers,
        batch_per_task=cfg.run.batch_per_task, seed=cfg.seed, value_head=value_head(cfg),
    )  # fmt: skip
    agent.fused = (
        fused(cfg) if use_kernels is None else use_kernels
    ) and fabric.device.type == "cpu"
    fabric.to_device(agent)
    inner = agent.configure_optimizers()
    run_programs(agent, inner, cfg.fabric.compile)
    _, *wrapped = fabric.setup(agent, *inner)
    return agent, wrapped


def check_memory(cfg: TrainConfig, spec: EnvSpec) -> None:
    """
    Raises:
        ConfigError: the replay does not fit into the memory of the learner's device.
    """
    size = round(spec.num_tasks * cfg.run.replay_per_task * bytes_per_transition(spec))
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    there = (
        torch.cuda.get_device_properties(0).total_memory
        if on_cuda
        else psutil.virtual_memory().total
    )
    if size > there:
        gib, most = 2**30, cfg.run.replay_per_task * there // size
        raise ConfigError(
            f"run.replay_per_task={cfg.run.replay_per_task}: takes {size / gib:,.0f} GiB of"
            f" {there / gib:,.0f}; must be at most {most:,} here"
        )


def check_suite(cfg: TrainConfig, suite: object) -> None:
    """
    Raises:
        ConfigError: the class is no task set.
    """
    if not isinstance(getattr(suite, "spec", None), EnvSpec):
        raise ConfigError(
            f"env._target_={target_of(cfg.env)}: must be a task set (softmod.spec.TaskSuite)"
        )


def check_value_head(cfg: TrainConfig) -> None:
    """
    Raises:
        ConfigError: what the value head makes of outputs has other shapes than it should.
    """
    head = value_head(cfg)
    line = f"critic_head._target_={target_of(cfg.critic_head)}"
    number = getattr(head, "outputs", None)
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"{line}: must have a whole number of outputs")
    critics, tasks, rows = 2, 3, 5
    outputs, reward = torch.zeros(critics, tasks, rows, number), torch.zeros(tasks, rows)
    try:
        value, target = head.value(outputs), head.target(reward, reward, outputs, reward)
        loss = head.loss(outputs, target, torch.ones(tasks))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{line}: fails on outputs of {critics} critics, {tasks} tasks, {rows} rows ({told})"
        ) from error
    for what, made, wanted in (("value", value, (tasks, rows)), ("loss", loss, (critics,))):
        if tuple(made.shape) != wanted:
            raise ConfigError(f"{line}: {what} has shape {list(made.shape)}, not {list(wanted)}")


def check_capture(cfg: TrainConfig, optimizer: Optimizer, key: str) -> None:
    """
    Raises:
        ConfigError: an update with this optimizer cannot be captured, which is asked for.
    """
    if cfg.fabric.compile == "captured" and not all(
        group.get("fused") for group in optimizer.param_groups
    ):
        raise ConfigError(
            f"fabric.compile=captured: only with a fused optimizer ({key}.fused=true), or eager"
        )


def check_surgery(cfg: TrainConfig, actor: Actor, critic: Network) -> None:
    """
    Raises:
        ConfigError: there is nothing for gradient surgery to do.
    """
    surgery = getattr(cfg.algorithm, "gradient_surgery", "none")
    for name, network in (("actor", actor.network), ("critic", critic)):
        if surgery != "none" and network.independent:
            alone = type(network).__name__
            raise ConfigError(
                f"algorithm.gradient_surgery={surgery}: tasks share no weights in {name} ({alone});"
                " none"
            )


def check_device(cfg: TrainConfig) -> None:
    """
    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    if cfg.fabric.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("fabric.accelerator=cuda: no CUDA device is available here (cpu, auto)")


# --- processes and threads ------------------------------------------------------------------------


def choose(
    cfg: TrainConfig, suite: TaskSuite, before: Mapping[str, Any] = MappingProxyType({})
) -> Chosen:
    """Choose processes and threads: as asked for, else as the run had them `before`, else what
    measures best.

    A run keeps its numbers because equal states need equal ones.
    """
    processes = before.get("processes") if cfg.workers.processes is None else cfg.workers.processes
    threads = cfg.fabric.threads or before.get("threads")
    if processes is not None and threads:
        return Chosen(processes, threads)
    steps, environments = (
        cfg.run.round_steps * cfg.workers.copies,
        suite.spec.num_tasks * cfg.workers.copies,
    )
    env_steps, episodes = steps * suite.spec.num_tasks, cfg.run.eval_goals * suite.spec.num_tasks
    evaluated = env_steps * episodes * suite.spec.horizon * PLAYED / cfg.run.eval_every
    wanted = Round(steps * cfg.run.update_ratio, env_steps, environments, evaluated)
    question = {"identity": identity(cfg), "processes": processes, "threads": threads} | {
        "accelerator": cfg.fabric.accelerator,
        "evaluated": evaluated,
        "torch": torch.__version__,
        "products": product_library(),
        "precision": precision(cfg),
        "fused": fused(cfg),
    }
    return remembered(
        cache_folder(),
        question,
        lambda: measure(cfg, suite, processes, threads),
        lambda costs: best(costs, wanted, processes, threads),
    )


def beside_others(cfg: TrainConfig, before: Mapping[str, Any] = MappingProxyType({})) -> Chosen:
    """Choose processes and threads of a run that learns beside others: it has a worker, and a share
    of the threads.
    """
    spare = 1 if available() > 1 else 0
    kept = before.get("processes", spare)
    return Chosen(kept if cfg.workers.processes is None else cfg.workers.processes, 1)


def measure(
    cfg: TrainConfig, suite: TaskSuite, processes: int | None, threads: int | None
) -> Costs:
    """An update's seconds by threads, with an agent of its own, and an environment step's, in a
    worker of its own.

    On a GPU, one thread is all that the learner needs.

    Raises:
        WorkerError: the environments cannot be built or stepped.
    """
    agent, _ = make_agent(cfg, suite.spec, *networks(cfg, suite.spec), make_fabric(cfg))
    replay = Replay(suite.spec, cfg.run.batch_per_task, agent.device)
    replay.extend(random_rollout(suite.spec, replay.capacity))
    update: dict[int, float] = {}
    delay = cfg.algorithm.policy_delay  # updates until all kinds of them were made
    for count in [threads] if threads else thread_counts() if agent.device.type == "cpu" else [1]:
        torch.set_num_threads(count)
        update[count] = timed(lambda: float(agent.learn(replay, delay)["finite"])) / delay
    torch.set_num_threads(1)
    plan, tasks = (
        Plan(suite, agent.actor.cpu(), cfg.seed),
        list(range(min(MEASURED_TASKS, suite.spec.num_tasks))),
    )
    with closing(
        start_worker(plan, tasks, [0], True, cfg.workers.timeout, inline=processes == 0)
    ) as worker:
        seconds = []
        for _ in range(MEASURED_ROUNDS):
            worker.ask("collect", cfg.run.round_steps)
            seconds.append(worker.answer().seconds)
    step = min(seconds) / (cfg.run.round_steps * len(tasks))
    return Costs(update, step)
