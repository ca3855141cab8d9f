"""A run's folder, its result if it is finished, and the checkpoint that it resumes from."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from softmod.checkpoint import files as checkpoint
from softmod.config.identity import flat, identity, of_results, run_folder
from softmod.config.schema import MOST, TrainConfig
from softmod.errors import CheckpointError, ConfigError
from softmod.experiment.folder import nearest_run
from softmod.spec import Result, TaskScore
from softmod.tracking import journal as tracking
from softmod.tracking import names
from softmod.tracking.record import Record

Found = tuple[Path, dict[str, Any]]


logger = logging.getLogger(__name__)


def place(cfg: TrainConfig) -> Path:
    """Return the run's folder; with `run.resume=never` a fresh one beside the existing ones.

    A job that SLURM requeued resumes in the newest existing one instead.
    """
    folder = run_folder(cfg)
    if cfg.run.resume != "never":
        return folder
    newest = folder
    taken = 0
    while os.path.lexists(fresh := folder.with_name(folder.name + (f".{taken}" if taken else ""))):
        newest = fresh
        taken = taken + 1
    return newest if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else fresh


def finished(cfg: TrainConfig, folder: Path) -> Result | None:
    """Return the result of a run that reached the configured end; else None.

    A malformed result is logged, and the run resumes from its last checkpoint.

    Raises:
        ConfigError: the folder cannot be read.
    """
    path = folder / "result.json"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        with checkpoint.reading(path):
            result = json.loads(text)
            env_steps = int(result["env_steps"])
            seconds = float(result["seconds"])
            reached = result["stopped_at"]
            stopped = bool(result.get("stopped_by_callback"))
            scores = [
                TaskScore(s["task"], s["success_rate"], s["return"], s["episodes"])
                for s in result["scores"]
            ]
    except CheckpointError as error:
        logger.warning("%s; the run resumes from its last checkpoint", error)
        return None
    enough = env_steps >= cfg.run.steps_per_task * len(cfg.env.tasks)
    out_of_time = cfg.run.max_minutes is not None and seconds >= 60.0 * cfg.run.max_minutes
    solved = (
        cfg.run.stop_at is not None and reached is not None and float(reached) >= cfg.run.stop_at
    )
    if not (enough or out_of_time or solved or stopped):
        return None
    return Result(folder, scores, env_steps, seconds)


def write_missing_status(folder: Path, env_steps: int) -> bool:
    """Write a missing FINISHED status; return True if one was written."""
    try:
        record = Record.read(folder)
        last = max(record.values.get(names.SUCCESS_MEAN, {}), default=-1)
        if record.status == "FINISHED" or last != env_steps or tracking.in_use(folder):
            return False
        journal = tracking.Journal(folder)
    except ConfigError:  # no journal, or not writable: the result stands without it
        return False
    journal.status("FINISHED")
    journal.close()
    return True


def resume_point(cfg: TrainConfig, folder: Path) -> Found | None:
    """Return the checkpoint to resume from, and its metadata; None for a new run.

    Raises:
        CheckpointError: there is none, and `run.resume=must` or `weights` or the run finished
            before; or none of them is valid; or the newest valid one belongs to another
            configuration.
        ConfigError: there is none, `run.resume=must` or `weights`, and a similar run exists beside
            it; or see `check_draws`.
    """
    found = checkpoint.newest(folder, whole=cfg.run.resume != "weights")
    if found is None and cfg.run.resume in ("must", "weights"):
        if nearest := nearest_run(folder, flat(of_results(cfg)) | {"seed": cfg.seed}):
            raise ConfigError(
                f"{nearest}; run.resume={cfg.run.resume} needs an equal configuration"
            )
        raise CheckpointError(
            f"run.resume={cfg.run.resume}: no checkpoint in {folder / 'checkpoints'}"
        )
    if found is None and (folder / "result.json").exists():  # written after the last checkpoint
        raise CheckpointError(
            f"{folder}: this run finished before, and its checkpoints are gone; copy checkpoints/"
            " and replay/ back to continue it, or start a new run with run.resume=never"
        )
    if found and found[1].get("identity") != identity(cfg):
        raise CheckpointError(
            f"{found[0]}: belongs to another configuration ({found[1].get('identity')})"
        )
    if found:
        check_draws(cfg, *found)
    kept = [found[1].get(name) for name in ("processes", "threads")] if found else []
    if found and not all(isinstance(number, int) and 0 <= number <= MOST for number in kept):
        raise CheckpointError(
            f"{found[0]}: processes and threads are {kept}; must be integers in [0, {MOST}]"
        )
    return found


def check_draws(cfg: TrainConfig, checkpoint: Path, metadata: dict[str, Any]) -> None:
    """Check that a resumed run draws batches and noise as it did before.

    Only the number of updates per graph may change: random numbers depend on where they are drawn.

    Raises:
        ConfigError: `fabric.updates_per_graph` is set to the other way.
    """
    wanted = cfg.fabric.updates_per_graph
    before = metadata.get("updates_per_graph") or 0
    if wanted is not None and bool(wanted) != bool(before):
        where = "device" if before else "host"
        raise ConfigError(
            f"fabric.updates_per_graph={wanted}: {checkpoint} draws on the {where}; must be"
            f" {'null or at least 1' if before else 'null or 0'}"
        )
