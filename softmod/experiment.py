"""One run of an experiment: find its folder, build its parts, train, tell how it ended."""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack, closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from omegaconf import OmegaConf

from softmod import checkpoint, machine, signals, tracking
from softmod.agent.mtsac import MTSAC
from softmod.agent.whole import whole_update
from softmod.clock import Clock, Schedule
from softmod.config import build, flat, identity, of_results, resolve_target, run_folder
from softmod.cores import (
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
from softmod.cpu import fast_products, keep_memory, product_library
from softmod.envs.goals import cache_folder
from softmod.envs.tasks import flawed_success
from softmod.errors import CheckpointError, ConfigError, UpdateError
from softmod.folder import nearest_run, refuse_links
from softmod.log import Log
from softmod.loop import train
from softmod.networks.network import Network
from softmod.progress import Progress, print_table
from softmod.randomness import Purpose, sequence
from softmod.replay import Replay
from softmod.saver import Saver
from softmod.schema import TrainConfig
from softmod.types import EnvSpec, TaskScore, TaskSuite
from softmod.uploader import LAST_WORDS, Uploader, start_uploader
from softmod.workers.pool import Workers
from softmod.workers.share import share_of
from softmod.workers.worker import Plan

Found = tuple[Path, dict[str, Any]]
MOST = 4096  # processes or threads that a checkpoint may ask for

logger = logging.getLogger(__name__)


def run_experiment(
    cfg: TrainConfig, resolved: dict[str, Any], overrides: list[str], sweep: dict[str, str] | None
) -> list[TaskScore]:
    """Train as configured, or go on where the run stopped, or say that it is finished; the final scores.

    Args:
        cfg: the validated configuration; `resolved` is the same as plain values, kept with the run.
        overrides: what was typed, for the run's name.
        sweep: id and name of the sweep that this run belongs to.

    Raises:
        ConfigError, CheckpointError, SaveError, WorkerError, NumericalError: see docs/exit_codes.md.
    """
    folder = place(cfg)
    refuse_links(folder, Path(cfg.run.folder))
    if result := finished(cfg, folder):
        env_steps, scores = result
        print_table(scores, f"{folder}: finished already, {env_steps:,} env steps; nothing to do")
        return scores
    check_device(cfg)
    parts = assemble(cfg)
    there, found = checkpoint.all_in(folder), resume_point(cfg, folder)  # what is wrong shows before a write
    with ExitStack() as stack:
        journal = tracking.Journal(folder)
        stack.callback(journal.close)
        if checkpoint.all_in(folder) != there:  # another process went on with the run, and is gone now
            found = resume_point(cfg, folder)
        tell_about(journal, cfg, resolved, folder)
        journal.status("RUNNING")
        uploader = None
        try:
            if cfg.tracking.mlflow:
                uploader = start_uploader(folder, cfg.tracking, about_run(cfg, overrides, sweep))
            scores = _train(cfg, resolved, folder, journal, found, parts)
            status = "FINISHED"
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            raise
        finally:
            journal.status(status)
            if uploader is not None:
                seconds = cfg.tracking.drain_seconds
                drain(uploader, min(LAST_WORDS, seconds) if status == "KILLED" else seconds, folder)
    return scores


def _train(
    cfg: TrainConfig,
    resolved: dict[str, Any],
    folder: Path,
    journal: tracking.Journal,
    found: Found | None,
    parts: tuple[TaskSuite, Network, Network],
) -> list[TaskScore]:
    suite, actor, critic = parts
    spec = suite.spec
    fabric = make_fabric(cfg)
    set_up(cfg, fabric.device)
    chosen = choose(cfg, suite, found)
    torch.set_num_threads(chosen.threads)
    with ExitStack() as stack:
        signals.leave_if_told()
        plan = Plan(suite, deepcopy(actor), cfg.seed, draw_goals=cfg.env.goals == "random")
        workers = stack.enter_context(Workers(plan, chosen.processes, cfg.workers.copies, cfg.workers.timeout))
        signals.leave_if_told()
        agent, optimizers = make_agent(cfg, spec, actor, critic, fabric)
        replay = Replay(spec, cfg.run.replay_per_task, fabric.device)
        clock = Clock()
        schedule = Schedule(
            spec, cfg.run.warmup_per_task, cfg.run.update_ratio, cfg.run.round_steps * cfg.workers.copies
        )
        about = {"config": resolved, "spec": spec.__dict__, "identity": identity(cfg), "seed": cfg.seed} | {
            "processes": chosen.processes,
            "threads": chosen.threads,
        }
        saver = Saver(folder, agent, optimizers, replay, workers, about)
        if found:
            with checkpoint.reading(found[0]):
                saver.restore(*found, clock)
        progress = stack.enter_context(Progress(cfg.run.steps_per_task * spec.num_tasks, cfg.run.max_minutes))
        progress.say(introduce(cfg, folder, chosen, fabric, agent, clock))
        for task, flaw in flawed_success(spec.tasks, cfg.env.reward).items():
            progress.say(f"warning: success of {task} with env.reward={cfg.env.reward}: {flaw}")
        log = Log(journal, spec, progress, cfg.tracking.system_metrics)
        if found and "log" in found[1]:
            with checkpoint.reading(found[0]):
                log.restore(found[1]["log"])
        try:
            scores = train(cfg.run, clock, schedule, agent, workers, replay, log, saver)
        except UpdateError as error:
            from softmod.replay_fault import bundle

            place = bundle(folder / "faults", agent, optimizers, about)
            allow = "".join(f" --allow {package}" for package in cfg.allow)
            raise UpdateError(f"{error}; python -m softmod.replay_fault {place}{allow} repeats it") from error
    conclude(cfg, folder, journal, clock, scores)
    return scores


# --- where a run lives ------------------------------------------------------------------------------------------------


def place(cfg: TrainConfig) -> Path:
    """The run's folder; with `run.resume=never` a fresh one beside those that exist."""
    folder = run_folder(cfg)
    if cfg.run.resume != "never":
        return folder
    taken = 0
    while (fresh := folder.with_name(folder.name + (f".{taken}" if taken else ""))).exists():
        taken += 1
    return fresh


def finished(cfg: TrainConfig, folder: Path) -> tuple[int, list[TaskScore]] | None:
    """The environment steps and the scores of a run that has nothing left to do."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        with checkpoint.reading(path):
            result = json.loads(path.read_text())
            env_steps, seconds = int(result["env_steps"]), float(result["seconds"])
            scores = [TaskScore(s["task"], s["success_rate"], s["return"], s["episodes"]) for s in result["scores"]]
    except CheckpointError as error:
        logger.warning("%s; the run goes on from its last checkpoint", error)
        return None
    enough = env_steps >= cfg.run.steps_per_task * len(cfg.env.tasks)
    out_of_time = cfg.run.max_minutes is not None and seconds >= 60.0 * cfg.run.max_minutes
    return (env_steps, scores) if enough or out_of_time else None


def resume_point(cfg: TrainConfig, folder: Path) -> Found | None:
    """The checkpoint to go on from, and its facts.

    Raises:
        CheckpointError: there is none and `run.resume=must`, or there are some and none is valid.
        ConfigError: there is none, and a run beside it differs in little from what is asked for.
    """
    found = checkpoint.newest(folder)
    if found is None and cfg.run.resume == "must":
        if nearest := nearest_run(folder, flat(of_results(cfg)) | {"seed": cfg.seed}):
            raise ConfigError(f"{nearest}; run.resume=must goes on only with an equal configuration")
        raise CheckpointError(f"run.resume=must: no checkpoint in {folder / 'checkpoints'}")
    if found and found[1].get("identity") != identity(cfg):
        raise CheckpointError(f"{found[0]}: belongs to another configuration ({found[1].get('identity')})")
    kept = [found[1].get(name) for name in ("processes", "threads")] if found else []
    if found and not all(isinstance(number, int) and 0 <= number <= MOST for number in kept):
        raise CheckpointError(f"{found[0]}: processes and threads are {kept}, not whole numbers of at most {MOST}")
    return found


# --- what a run is built of -------------------------------------------------------------------------------------------


def choose(cfg: TrainConfig, suite: TaskSuite, found: Found | None) -> Chosen:
    """What was asked for, else what the run had before (equal states need equal numbers), else what measures best."""
    before = found[1] if found else {}
    processes = before.get("processes") if cfg.workers.processes is None else cfg.workers.processes
    threads = cfg.fabric.threads or before.get("threads")
    if processes is not None and threads:
        return Chosen(processes, threads)
    steps, environments = cfg.run.round_steps * cfg.workers.copies, suite.spec.num_tasks * cfg.workers.copies
    wanted = Round(steps * cfg.run.update_ratio, steps * suite.spec.num_tasks, environments)
    question = {"identity": identity(cfg), "processes": processes, "threads": threads} | {
        "torch": torch.__version__,
        "products": product_library(),
    }
    return remembered(
        cache_folder(),
        question,
        lambda: measure(cfg, suite, processes, threads),
        lambda costs: best(costs, wanted, processes, threads),
    )


def measure(cfg: TrainConfig, suite: TaskSuite, processes: int | None, threads: int | None) -> Costs:
    """An update's seconds by threads, with an agent of its own, and an environment step's, in a worker of its own.

    Raises:
        WorkerError: the environments cannot be built or stepped.
    """
    agent, _ = make_agent(cfg, suite.spec, *networks(cfg, suite.spec), make_fabric(cfg))
    replay = Replay(suite.spec, cfg.run.batch_per_task, agent.device)
    replay.append(torch.randn(suite.spec.num_tasks, replay.capacity, sum(replay.widths)))
    update: dict[int, float] = {}
    for count in [threads] if threads else thread_counts():
        torch.set_num_threads(count)
        update[count] = timed(lambda: float(agent.learn(replay, 1)["finite"]))
    torch.set_num_threads(1)
    plan, tasks = Plan(suite, agent.actor.cpu(), cfg.seed), list(range(min(MEASURED_TASKS, suite.spec.num_tasks)))
    with closing(share_of(plan, tasks, [0], True, cfg.workers.timeout, inline=processes == 0)) as share:
        seconds = []
        for _ in range(MEASURED_ROUNDS):
            share.ask("collect", cfg.run.round_steps)
            seconds.append(share.answer().seconds)
    step = min(seconds) / (cfg.run.round_steps * len(tasks))
    return Costs(update, step)


def assemble(cfg: TrainConfig) -> tuple[TaskSuite, Network, Network]:
    """The task set, its goals drawn, and the networks: what can be wrong with a configuration shows here.

    Raises:
        ConfigError: a class is not where `_target_` says, is none of those allowed, or does not take the options.
    """
    suite: TaskSuite = build(cfg.env, cfg.allow, "env")
    for task in range(suite.spec.num_tasks):
        suite.goals(task)  # now, so that no worker draws them anew
    actor, critic = networks(cfg, suite.spec)
    check_memory(cfg, suite.spec)
    for name in ("actor", "critic", "temperature"):
        build(getattr(cfg.optimizer, name), cfg.allow, f"optimizer.{name}", params=[torch.zeros(1, requires_grad=True)])
    resolve_target(cfg.algorithm._target_, cfg.allow)
    return suite, actor, critic


def networks(cfg: TrainConfig, spec: EnvSpec) -> tuple[Network, Network]:
    """Actor and twin critics, their start values drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(sequence(cfg.seed, Purpose.NETWORKS).generate_state(1)[0]))
        sizes = {"num_tasks": spec.num_tasks}
        actor: Network = build(
            cfg.actor, cfg.allow, "actor", in_dim=spec.obs_dim, out_dim=2 * spec.action_dim, stack=1, **sizes
        )
        critic: Network = build(
            cfg.critic, cfg.allow, "critic", in_dim=spec.obs_dim + spec.action_dim, out_dim=1, stack=2, **sizes
        )
    return actor, critic


def set_up(cfg: TrainConfig, device: torch.device) -> None:
    """What lies under the learner: the C library, the library of matrix products and its precision."""
    keep_memory()
    if device.type == "cpu":
        fast_products()
        return
    torch.set_float32_matmul_precision("high" if cfg.fabric.precision == "tf32" else "highest")
    if cfg.fabric.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def make_fabric(cfg: TrainConfig) -> L.Fabric:
    precision: Any = "32-true" if cfg.fabric.precision == "tf32" else cfg.fabric.precision
    return L.Fabric(accelerator=cfg.fabric.accelerator, devices=1, precision=precision)


def make_agent(
    cfg: TrainConfig, spec: EnvSpec, actor: Network, critic: Network, fabric: L.Fabric
) -> tuple[MTSAC, list[Any]]:
    """The agent on the learner's device, and its optimizers."""

    def maker(name: str) -> Any:
        return lambda parameters: build(getattr(cfg.optimizer, name), cfg.allow, f"optimizer.{name}", params=parameters)

    optimizers = {name: maker(name) for name in ("actor", "critic", "temperature")}
    agent: MTSAC = build(
        cfg.algorithm, cfg.allow, "algorithm", spec=spec, actor=actor, critic=critic, optimizers=optimizers,
        batch_per_task=cfg.run.batch_per_task, seed=cfg.seed,
    )  # fmt: skip
    fabric.to_device(agent)
    inner = agent.configure_optimizers()
    agent.run = whole_update(agent, inner, cfg.fabric.compile)
    _, *wrapped = fabric.setup(agent, *inner)
    return agent, wrapped


def check_memory(cfg: TrainConfig, spec: EnvSpec) -> None:
    """
    Raises:
        ConfigError: the replay does not fit into the memory of the learner's device.
    """
    size = 4 * spec.num_tasks * cfg.run.replay_per_task * (2 * spec.obs_dim + spec.action_dim + 1)
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if on_cuda else psutil.virtual_memory().total
    if size > there:
        gib, most = 2**30, cfg.run.replay_per_task * there // size
        raise ConfigError(
            f"run.replay_per_task={cfg.run.replay_per_task}: takes {size / gib:,.0f} GiB of {there / gib:,.0f}; "
            f"must be at most {most:,} here"
        )


def check_device(cfg: TrainConfig) -> None:
    """
    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    if cfg.fabric.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("fabric.accelerator=cuda: no CUDA device is available here (cpu, auto)")


# --- what a run tells -------------------------------------------------------------------------------------------------


def about_run(cfg: TrainConfig, overrides: list[str], sweep: dict[str, str] | None) -> dict[str, Any]:
    """What MLflow needs to know to file the run."""
    skipped = ("seed=", "experiment=", "method=", "name=", "env=", "run=", "tracking", "run.folder", "sweep=", "hydra.")
    own = [override for override in overrides if not override.startswith(skipped)]
    name = " ".join([cfg.name, f"seed={cfg.seed}", *own])
    return {"experiment": cfg.tracking.experiment or cfg.env.name, "run_name": name[:250], "sweep": sweep}


def tell_about(journal: tracking.Journal, cfg: TrainConfig, resolved: dict[str, Any], folder: Path) -> None:
    """The configuration and where it runs, into the journal and the folder."""
    with checkpoint.writing(folder / "config.yaml"):
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    journal.params(flat(resolved))
    group = f"{cfg.name}-{identity(cfg)}"
    journal.tags(machine.environment_tags() | {"softmod.name": cfg.name, "softmod.group": group})
    journal.artifact(folder / "config.yaml")


def drain(uploader: Uploader, seconds: float, folder: Path) -> None:
    """Let the rest be uploaded, and say what to do where it could not be, also when Ctrl-C ends the waiting."""
    try:
        uploader.close(seconds)
    finally:
        if not uploader.complete:
            Progress(0).say(f"not everything was uploaded; this finishes it: python -m softmod.upload {folder}")


def introduce(cfg: TrainConfig, folder: Path, chosen: Chosen, fabric: L.Fabric, agent: MTSAC, clock: Clock) -> str:
    where = f"{chosen.processes} worker processes" if chosen.processes else "workers inline"
    size = f"actor {agent.actor.num_parameters():,} parameters, critics {agent.critic.num_parameters():,}"
    device = f"{fabric.device} ({product_library()})" if fabric.device.type == "cpu" else str(fabric.device)
    begin = f"; goes on at {clock.env_steps:,} env steps" if clock.env_steps else ""
    return f"{folder}: {len(cfg.env.tasks)} tasks, {where}, {chosen.threads} threads on {device}, {size}{begin}"


def conclude(cfg: TrainConfig, folder: Path, journal: tracking.Journal, clock: Clock, scores: list[TaskScore]) -> None:
    """The result: on the terminal, in the run's folder, as artifacts."""
    from softmod.figures import success_figure

    result = {
        "env_steps": clock.env_steps,
        "seconds": clock.seconds,
        "success_rate": sum(score.success_rate for score in scores) / len(scores),
        "scores": [score.as_dict() for score in scores],
    }
    with checkpoint.writing(folder / "evaluation.json"):
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
        success_figure(journal, folder / "success.png")
    for name in ("evaluation.json", "success.png"):
        journal.artifact(folder / name)
    journal.artifact(folder / "checkpoints" / "best", under="checkpoints")
    with checkpoint.writing(folder / "result.json"):
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    minutes = clock.seconds / 60
    print_table(scores, f"{folder}: {clock.env_steps:,} env steps in {minutes:.1f} minutes")
