"""One run of an experiment: find its folder, build its parts, train, tell how it ended."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf

from softmod import kernels
from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import Replay
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.saver import Saver
from softmod.clock import Clock, Schedule
from softmod.config.identity import as_values, flat, identity, of_results, run_folder
from softmod.config.schema import TrainConfig
from softmod.config.trust import foreign
from softmod.envs.tasks import flawed_success
from softmod.errors import CheckpointError, ConfigError, UpdateError
from softmod.experiment.autotune import Chosen
from softmod.experiment.build import (
    assemble,
    beside_others,
    check_device,
    choose,
    fused,
    make_agent,
    make_fabric,
    make_plan,
    precision,
    set_up,
)
from softmod.experiment.folder import nearest_run, refuse_links
from softmod.experiment.loop import Run, alone, train
from softmod.experiment.seeds import side_by_side
from softmod.experiment.session import Parts
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.spec import TaskScore, TaskSuite, mean_success
from softmod.system import hardware as machine
from softmod.system import signals
from softmod.system.libraries import product_library
from softmod.tracking import journal as tracking
from softmod.tracking import names
from softmod.tracking.console import Board, Progress, print_means, print_table
from softmod.tracking.metrics import Log
from softmod.tracking.record import Record
from softmod.tracking.redact import without_passwords
from softmod.tracking.uploader import LAST_WORDS, Uploader, belongs, remember, start_uploader
from softmod.workers.pool import Workers

Found = tuple[Path, dict[str, Any]]
MOST = 4096  # processes or threads that a checkpoint may ask for

logger = logging.getLogger(__name__)


def run_experiment(
    cfg: TrainConfig, overrides: list[str], sweep: dict[str, str] | None
) -> list[TaskScore]:
    """Train as configured, or go on where the run stopped, or say that it is finished; the final
    scores.

    Args:
        cfg: the validated configuration.
        overrides: what was typed, for the run's name.
        sweep: id and name of the sweep that this run belongs to.

    Raises:
        ConfigError, CheckpointError, SaveError, WorkerError, NumericalError: see
            docs/exit_codes.md.
    """
    return alone(one_run(cfg, overrides, sweep))


def run_seeds(
    cfg: TrainConfig,
    overrides: list[str],
    sweep: dict[str, str] | None,
    failed: Callable[[int, Exception], None],
) -> dict[int, list[TaskScore]]:
    """Train with each of `cfg.seeds`, side by side; the final scores of those that came to their
    end.

    Each is a run of its own: what `run_experiment` makes with its seed, and goes on with. `failed`
    is given the seed and the error of one that fails, which ends no other.
    """
    seeds = cfg.seeds or []
    typed = [override for override in overrides if not override.startswith("seeds=")]
    with Board() as board:
        runs = {
            seed: one_run(
                dataclasses.replace(cfg, seed=seed, seeds=None),
                [*typed, f"seed={seed}"],
                sweep,
                board,
            )
            for seed in seeds
        }
        results = side_by_side(runs, cfg.fabric.threads or machine.available(), failed)
    if results:
        means = [mean_success(scores) for scores in results.values()]
        print_means(dict(zip(results, means, strict=True)))
    return results


def one_run(
    cfg: TrainConfig,
    overrides: list[str],
    sweep: dict[str, str] | None,
    board: Board | None = None,
) -> Run[list[TaskScore]]:
    """Do what `run_experiment` does, as a run that asks for its updates; with a `board`, it is one
    of several.
    """
    folder = place(cfg)
    refuse_links(folder, Path(cfg.run.folder))
    if result := finished(cfg, folder):
        env_steps, scores = result
        news = settle(folder, env_steps)
        if cfg.tracking.mlflow and (
            news or not belongs(folder, cfg.tracking, sweep)
        ):  # one of this sweep's runs too
            about = about_run(cfg, overrides, sweep)
            drain(
                start_uploader(folder, cfg.tracking, about),
                cfg.tracking.drain_seconds,
                folder,
                cfg,
                sweep,
            )
        print_table(scores, f"{folder}: finished already, {env_steps:,} env steps; nothing to do")
        return scores
    check_device(cfg)
    parts = assemble(cfg)
    there = checkpoint.versions(folder)
    found = resume_point(cfg, folder)  # what is wrong shows before a write
    with ExitStack() as stack:
        journal = tracking.Journal(folder)
        stack.callback(journal.close)
        # Another process may have gone on with the run, and be gone now.
        if checkpoint.versions(folder) != there:
            found = resume_point(cfg, folder)
        tell_about(journal, cfg, folder)
        journal.tags({"softmod.command": shlex.join(["python", "-m", "softmod.train", *overrides])})
        journal.status("RUNNING")
        uploader = None
        try:
            if cfg.tracking.mlflow:
                uploader = start_uploader(folder, cfg.tracking, about_run(cfg, overrides, sweep))
            scores = yield from _train(cfg, folder, journal, found, parts, board)
            status = "FINISHED"
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            raise
        finally:
            journal.status(status)
            if uploader is not None:
                seconds = cfg.tracking.drain_seconds
                drain(
                    uploader,
                    min(LAST_WORDS, seconds) if status == "KILLED" else seconds,
                    folder,
                    cfg,
                    sweep,
                )
    return scores


def _train(
    cfg: TrainConfig,
    folder: Path,
    journal: tracking.Journal,
    found: Found | None,
    parts: tuple[TaskSuite, Actor, Network],
    board: Board | None,
) -> Run[list[TaskScore]]:
    suite, actor, critic = parts
    spec = suite.spec
    before = found[1] if found else {}
    wanted, use_kernels = precision(cfg, before), fused(cfg, before)
    fabric = make_fabric(cfg, wanted)
    set_up(cfg, fabric.device)
    chosen = choose(cfg, suite, before) if board is None else beside_others(cfg, before)
    torch.set_num_threads(chosen.threads)
    journal.tags(where_it_runs(chosen, wanted, use_kernels, fabric))
    with ExitStack() as stack:
        signals.leave_if_told()
        plan = make_plan(cfg, suite, actor)
        workers = stack.enter_context(
            Workers(plan, chosen.processes, cfg.workers.copies, cfg.workers.timeout)
        )
        signals.leave_if_told()
        agent, optimizers = make_agent(cfg, spec, actor, critic, fabric, use_kernels)
        replay = Replay(spec, cfg.run.replay_per_task, fabric.device, cfg.workers.copies)
        clock = Clock()
        schedule = Schedule(
            spec,
            cfg.run.warmup_per_task,
            cfg.run.update_ratio,
            cfg.run.round_steps * cfg.workers.copies,
        )
        about = {
            "config": without_passwords(as_values(cfg)),
            "spec": spec.__dict__,
            "identity": identity(cfg),
            "seed": cfg.seed,
        } | {
            "processes": chosen.processes,
            "threads": chosen.threads,
            "precision": wanted,
            "fused": kernels.key() if use_kernels else before.get("fused"),
        }
        saver = Saver(folder, agent, optimizers, replay, workers, about)
        if found:
            with checkpoint.reading(found[0]):
                saver.restore(*found, clock)
        progress = stack.enter_context(
            Progress(
                cfg.run.steps_per_task * spec.num_tasks,
                cfg.run.max_minutes,
                board=board,
                name=f"seed {cfg.seed}",
            )
        )
        progress.say(introduce(cfg, folder, chosen, wanted, fabric, agent, clock))
        for task, flaw in flawed_success(spec.tasks, cfg.env.reward).items():
            progress.say(f"warning: success of {task} with env.reward={cfg.env.reward}: {flaw}")
        if board is not None and before.get("threads", 1) != 1:
            progress.say(
                "warning: this run used several threads and goes on with one: results differ by"
                " rounding"
            )
        if before.get("fused") and before["fused"] != (kernels.key() if use_kernels else None):
            how = "other fused kernels" if use_kernels else "none"
            progress.say(
                f"warning: this run used fused kernels and goes on with {how}: results differ by"
                " rounding"
            )
        log = Log(journal, spec, progress, cfg.tracking.system_metrics)
        if found and "log" in found[1]:
            with checkpoint.reading(found[0]):
                log.restore(found[1]["log"])
        try:
            scores = yield from train(
                cfg.run, Parts(agent, replay, workers, clock, schedule, log, saver)
            )
        except UpdateError as error:
            from softmod.checkpoint.bundle import bundle

            place = bundle(folder / "faults", agent, optimizers, about)
            allow = "".join(f" --allow {package}" for package in foreign(as_values(cfg)))
            raise UpdateError(
                f"{error}; python -m softmod.replay_fault {place}{allow} repeats it"
            ) from error
    conclude(cfg, folder, journal, clock, scores)
    return scores


# --- where a run lives ----------------------------------------------------------------------------


def place(cfg: TrainConfig) -> Path:
    """The run's folder; with `run.resume=never` a fresh one beside those that exist.

    A job that SLURM has queued again goes on with the newest of them instead.
    """
    folder = run_folder(cfg)
    if cfg.run.resume != "never":
        return folder
    newest, taken = folder, 0
    while (fresh := folder.with_name(folder.name + (f".{taken}" if taken else ""))).exists():
        newest, taken = fresh, taken + 1
    return newest if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else fresh


def finished(cfg: TrainConfig, folder: Path) -> tuple[int, list[TaskScore]] | None:
    """The environment steps and the scores of a run that has nothing left to do."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        with checkpoint.reading(path):
            result = json.loads(path.read_text())
            env_steps, seconds = int(result["env_steps"]), float(result["seconds"])
            reached = result["stopped_at"]
            scores = [
                TaskScore(s["task"], s["success_rate"], s["return"], s["episodes"])
                for s in result["scores"]
            ]
    except CheckpointError as error:
        logger.warning("%s; the run goes on from its last checkpoint", error)
        return None
    enough = env_steps >= cfg.run.steps_per_task * len(cfg.env.tasks)
    out_of_time = cfg.run.max_minutes is not None and seconds >= 60.0 * cfg.run.max_minutes
    solved = (
        cfg.run.stop_at is not None and reached is not None and float(reached) >= cfg.run.stop_at
    )
    return (env_steps, scores) if enough or out_of_time or solved else None


def settle(folder: Path, env_steps: int) -> bool:
    """A finished run that was ended before it could say so says so now; whether that was news."""
    try:
        record = Record.read(folder)
        last = max(record.values.get(names.SUCCESS_MEAN, {}), default=-1)
        if record.status == "FINISHED" or last != env_steps or tracking.in_use(folder):
            return False
        journal = tracking.Journal(folder)
    except (
        ConfigError
    ):  # without a journal, or where nothing can be written, there is a result all the same
        return False
    journal.status("FINISHED")
    journal.close()
    return True


def resume_point(cfg: TrainConfig, folder: Path) -> Found | None:
    """The checkpoint to go on from, and its facts.

    Raises:
        CheckpointError: there is none and `run.resume=must`, or there are some and none is valid.
        ConfigError: there is none, and a run beside it differs in little from what is asked for.
    """
    found = checkpoint.newest(folder)
    if found is None and cfg.run.resume == "must":
        if nearest := nearest_run(folder, flat(of_results(cfg)) | {"seed": cfg.seed}):
            raise ConfigError(
                f"{nearest}; run.resume=must goes on only with an equal configuration"
            )
        raise CheckpointError(f"run.resume=must: no checkpoint in {folder / 'checkpoints'}")
    if found and found[1].get("identity") != identity(cfg):
        raise CheckpointError(
            f"{found[0]}: belongs to another configuration ({found[1].get('identity')})"
        )
    kept = [found[1].get(name) for name in ("processes", "threads")] if found else []
    if found and not all(isinstance(number, int) and 0 <= number <= MOST for number in kept):
        raise CheckpointError(
            f"{found[0]}: processes and threads are {kept}, not whole numbers of at most {MOST}"
        )
    return found


# --- what a run tells -----------------------------------------------------------------------------


def about_run(
    cfg: TrainConfig, overrides: list[str], sweep: dict[str, str] | None
) -> dict[str, Any]:
    """Collect what MLflow needs to file the run."""
    skipped = (
        "seed=",
        "experiment=",
        "model=",
        "name=",
        "env=",
        "run=",
        "tracking",
        "run.folder",
        "sweep=",
        "hydra.",
    )
    own = [override for override in overrides if not override.startswith(skipped)]
    name = " ".join([cfg.name, f"seed={cfg.seed}", *own])
    return {
        "experiment": cfg.tracking.experiment or cfg.env.name,
        "run_name": name[:250],
        "sweep": sweep,
    }


def tell_about(journal: tracking.Journal, cfg: TrainConfig, folder: Path) -> None:
    """Write the configuration into folder and journal, and where it runs into the journal."""
    values = without_passwords(as_values(cfg))
    with checkpoint.writing(folder / "config.yaml"):
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    journal.params(flat(values))
    group = f"{cfg.name}-{identity(cfg)}"
    journal.tags(machine.environment_tags() | {"softmod.name": cfg.name, "softmod.group": group})
    journal.artifact(folder / "config.yaml")


def drain(
    uploader: Uploader,
    seconds: float,
    folder: Path,
    cfg: TrainConfig,
    sweep: Mapping[str, str] | None,
) -> None:
    """Let the rest be uploaded, and say what to do where it could not be, also when Ctrl-C ends the
    waiting.
    """
    try:
        if uploader.close(seconds):
            remember(folder, cfg.tracking, sweep)
    finally:
        if not uploader.complete:
            Progress(0).say(
                f"not everything was uploaded; this finishes it: python -m softmod.upload {folder}"
            )


def where_it_runs(
    chosen: Chosen, wanted: str, use_kernels: bool, fabric: L.Fabric
) -> dict[str, str]:
    """Return the tags of the machine and of what was chosen for it."""
    accelerator = (
        torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "none"
    )
    choice = {
        "machine.worker_processes": str(chosen.processes),
        "machine.threads": str(chosen.threads),
    }
    choice |= {"machine.precision": wanted, "machine.kernels": "fused" if use_kernels else "none"}
    return machine.hardware_tags(accelerator) | choice


def introduce(
    cfg: TrainConfig,
    folder: Path,
    chosen: Chosen,
    wanted: str,
    fabric: L.Fabric,
    agent: MTSAC,
    clock: Clock,
) -> str:
    where = f"{chosen.processes} worker processes" if chosen.processes else "workers inline"
    size = (
        f"actor {agent.actor.num_parameters():,} parameters, critics"
        f" {agent.critic.num_parameters():,}"
    )
    by = (
        product_library()
        if fabric.device.type == "cpu"
        else torch.cuda.get_device_name(fabric.device)
    )
    own = ", fused kernels" if agent.fused else ""
    how = f"{where}, {chosen.threads} threads on {fabric.device} ({by}, {wanted}{own})"
    begin = f"; goes on at {clock.env_steps:,} env steps" if clock.env_steps else ""
    return f"{folder}: {len(cfg.env.tasks)} tasks, {how}, {size}{begin}"


def conclude(
    cfg: TrainConfig, folder: Path, journal: tracking.Journal, clock: Clock, scores: list[TaskScore]
) -> None:
    """The result: on the terminal, in the run's folder, as artifacts."""
    from softmod.tracking.figures import success_figure

    result = {
        "env_steps": clock.env_steps,
        "seconds": clock.seconds,
        "stopped_at": cfg.run.stop_at if clock.solved(cfg.run.stop_at) else None,
        "success_rate": mean_success(scores),
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
