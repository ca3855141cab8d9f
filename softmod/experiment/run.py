"""Runs of an experiment: find the folder, build the parts, train, publish the results."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from softmod.agent.replay import Replay
from softmod.checkpoint import files
from softmod.checkpoint.files import reading
from softmod.checkpoint.saver import Saver
from softmod.clock import Clock, Schedule
from softmod.command import described
from softmod.config.identity import as_values, identity
from softmod.config.schema import TrainConfig
from softmod.config.trust import foreign
from softmod.errors import CheckpointError, UpdateError
from softmod.experiment.build import Models, assemble, make_agent, make_plan
from softmod.experiment.callbacks import Callback, make_callbacks
from softmod.experiment.checks import check_compiler, check_device, check_store
from softmod.experiment.folder import refuse_links
from softmod.experiment.initial import REPORT, initialize, pinned
from softmod.experiment.loop import Run, alone, train
from softmod.experiment.publish import (
    Announce,
    conclude,
    followed,
    introduce,
    tell_about,
    upload_finished,
    warn,
)
from softmod.experiment.resources import Resources, claim
from softmod.experiment.resume import Found, finished, place, resume_point
from softmod.experiment.seeds import side_by_side
from softmod.experiment.session import Parts
from softmod.spec import Result
from softmod.system import hardware as machine
from softmod.system import signals
from softmod.system.libraries import default_torch
from softmod.tracking.console import Board, Progress, print_means, print_table
from softmod.tracking.journal import Journal
from softmod.tracking.metrics import Log
from softmod.tracking.redact import redacted, without_passwords
from softmod.tracking.transcript import Transcript
from softmod.workers.pool import Workers


@default_torch()
def run_experiment(
    cfg: TrainConfig,
    overrides: list[str],
    sweep: dict[str, str] | None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Start or resume the configured run, and return its result.

    A finished run is not trained again; its stored result is printed and returned.

    Args:
        cfg: the validated configuration.
        overrides: overrides from the command line, for the run's name.
        sweep: id and name of the sweep that this run belongs to.
        callbacks: besides those of the configuration.

    Raises:
        ConfigError, CheckpointError, SaveError, WorkerError, NumericalError: see
            docs/exit_codes.md.
    """
    return alone(one_run(cfg, overrides, sweep, callbacks))


def run_seeds(
    cfg: TrainConfig,
    overrides: list[str],
    sweep: dict[str, str] | None,
    failed: Callable[[int, Exception], None],
) -> dict[int, Result]:
    """Train with each of `cfg.seeds`, side by side; return the results of completed runs.

    Each is the run that `run_experiment` starts or resumes with that seed.

    Args:
        cfg: the validated configuration, with `seeds`.
        overrides: overrides from the command line, for the runs' names.
        sweep: id and name of the sweep that these runs belong to.
        failed: called with seed and error of each run that fails; the other runs continue.
    """
    seeds = cfg.seeds or []
    typed = [override for override in overrides if not override.startswith("seeds=")]
    with Board() as board:
        runs = {
            seed: one_run(
                dataclasses.replace(cfg, seed=seed, seeds=None),
                [*typed, f"seed={seed}"],
                sweep,
                board=board,
            )
            for seed in seeds
        }
        results = side_by_side(runs, cfg.fabric.threads or machine.available(), failed)
    if results:
        print_means({seed: result.success_rate for seed, result in results.items()})
    return results


def one_run(
    cfg: TrainConfig,
    overrides: list[str],
    sweep: dict[str, str] | None,
    callbacks: Sequence[Callback] = (),
    board: Board | None = None,
) -> Run[Result]:
    """Do what `run_experiment` does, as a generator that yields its updates.

    With a `board`, it is one of several runs that share a process and a progress display.
    """
    cfg = pinned(cfg)
    folder = place(cfg)
    refuse_links(folder, Path(cfg.run.folder))
    check_store(cfg)
    if result := finished(cfg, folder):
        upload_finished(cfg, folder, result.env_steps, overrides, sweep)
        done = f"finished already, {result.env_steps:,} env steps; nothing to do"
        print_table(result.scores, f"{folder}: {done}")
        return result
    check_device(cfg)
    check_compiler(cfg)
    called = make_callbacks(cfg, callbacks)
    models = assemble(cfg)
    there = files.versions(folder)
    found = resume_point(cfg, folder)  # before the first write, so that errors leave no trace
    with closing(Journal(folder)) as journal:
        # Another process may have trained this run and ended since the checkpoint was read.
        if files.versions(folder) != there:
            found = resume_point(cfg, folder)
        tell_about(journal, cfg, folder)
        command = redacted(shlex.join(["python", "-m", "softmod.train", *overrides]))
        journal.tags({"softmod.command": command})
        with followed(cfg, folder, journal, overrides, sweep), transcribed(folder, command):
            result = yield from _train(cfg, folder, journal, found, models, called, board)
    return result


@contextmanager
def transcribed(folder: Path, command: str) -> Iterator[None]:
    """Write the begin of a session, its warnings and the error that ends it to `train.log`."""
    transcript = Transcript(folder)
    transcript.begin(command)
    try:
        with transcript.of_warnings():
            yield
    except signals.StoppedError as stop:
        transcript.line(f"softmod: {stop}; {stop.how}")
        raise
    except KeyboardInterrupt:
        transcript.line("softmod: interrupted")
        raise
    except Exception as error:
        transcript.line(described(error))
        raise


def _train(
    cfg: TrainConfig,
    folder: Path,
    journal: Journal,
    found: Found | None,
    models: Models,
    callbacks: tuple[Callback, ...],
    board: Board | None,
) -> Run[Result]:
    """Build the parts, restore them, train, and write the result."""
    spec = models.suite.spec
    resources = claim(cfg, models.suite, found[1] if found else {}, beside=board is not None)
    journal.tags(resources.tags())
    total = cfg.run.steps_per_task * spec.num_tasks
    progress = Progress(
        total,
        cfg.run.max_minutes,
        board=board,
        name=f"seed {cfg.seed}",
        transcript=Transcript(folder),
    )
    callbacks = (*callbacks, Announce(cfg, progress))
    signals.leave_if_told()
    plan = make_plan(cfg, models.suite, models.actor)
    workers = Workers(plan, resources.processes, cfg.workers.copies, cfg.workers.timeout)
    with workers, progress:
        signals.leave_if_told()
        log = Log(journal, spec, progress, cfg.tracking.system_metrics)
        parts = make_parts(cfg, models, resources, workers, log, folder, callbacks)
        remarks: list[str] = []
        if found:
            remarks = restore(parts, *found)
        elif cfg.init_from is not None:
            taken = initialize(cfg, parts.saver.agent, folder)
            journal.artifact(folder / REPORT)
            remarks = [f"init_from={cfg.init_from}: {line}" for line in taken.lines()]
        progress.say(introduce(cfg, folder, resources, parts))
        for remark in remarks:
            progress.say(remark)
        warn(cfg, resources, spec, progress)
        try:
            scores = yield from train(cfg.run, parts)
        except UpdateError as error:
            if parts.saver.agent.given is None:  # no update was made in this session
                raise
            raise UpdateError(f"{error}; {bundle_of(parts, folder)} repeats it") from error
    return conclude(cfg, folder, journal, parts.clock, scores)


def make_parts(
    cfg: TrainConfig,
    models: Models,
    resources: Resources,
    workers: Workers,
    log: Log,
    folder: Path,
    callbacks: tuple[Callback, ...],
) -> Parts:
    """Build the parts of the loop; the caller owns and closes workers and log."""
    spec = models.suite.spec
    fabric = resources.fabric
    agent, optimizers = make_agent(
        cfg, spec, models.actor, models.critic, fabric, resources.fused, resources.per_graph
    )
    replay = Replay(spec, cfg.run.replay_per_task, fabric.device, cfg.workers.copies)
    steps = cfg.run.round_steps * cfg.workers.copies
    schedule = Schedule(spec, cfg.run.warmup_per_task, cfg.run.update_ratio, steps)
    metadata = resources.saved() | {
        "config": without_passwords(as_values(cfg)),
        "spec": spec.__dict__,
        "identity": identity(cfg),
        "seed": cfg.seed,
    }
    saver = Saver(folder, agent, optimizers, replay, workers, metadata)
    return Parts(
        agent, replay, workers, Clock(), schedule, log, saver, callbacks, resources.in_turns
    )


def restore(parts: Parts, checkpoint: Path, metadata: dict[str, Any]) -> list[str]:
    """Restore all parts from a checkpoint; return remarks for the terminal.

    With `run.resume=weights`, a replay that is missing or damaged stays empty. It is refilled as in
    the warm-up, but with actions of the trained policy.

    Raises:
        CheckpointError: the checkpoint does not match the parts.
    """
    lost = ""
    if parts.saver.about["config"]["run"]["resume"] == "weights":
        try:
            files.verify(checkpoint)
        except CheckpointError as error:
            lost = str(error)
    with reading(checkpoint):
        parts.saver.restore(checkpoint, metadata, parts.clock, replay=not lost)
        if "log" in metadata:
            parts.log.restore(metadata["log"])
    if not lost:
        return []
    parts.log.journal.tags({"softmod.replay_refilled_at": str(parts.clock.env_steps)})
    steps = parts.schedule.warmup_per_task
    return [f"{lost}; {steps:,} steps of each task refill the replay before the next update"]


def bundle_of(parts: Parts, folder: Path) -> str:
    """Save the inputs of the last update; return the command that replays it."""
    from softmod.checkpoint.bundle import bundle

    saver = parts.saver
    written = bundle(folder / "faults", saver.agent, saver.optimizers, saver.about)
    allow = "".join(f" --allow {package}" for package in foreign(saver.about["config"]))
    return f"python -m softmod.replay_fault {shlex.quote(str(written))}{allow}"
