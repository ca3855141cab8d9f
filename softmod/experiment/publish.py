"""What a run writes down and prints, beside its metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from softmod.checkpoint import files as checkpoint
from softmod.clock import Clock
from softmod.config.identity import as_values, flat, identity
from softmod.config.schema import TrainConfig
from softmod.envs.tasks import flawed_success
from softmod.errors import one_line
from softmod.experiment.resources import Resources
from softmod.experiment.resume import settle
from softmod.experiment.session import Parts
from softmod.spec import EnvSpec, Result, TaskScore, mean_success
from softmod.system import hardware as machine
from softmod.tracking import journal as tracking
from softmod.tracking.console import Progress, print_table
from softmod.tracking.redact import without_passwords
from softmod.tracking.uploader import LAST_WORDS, Uploader, belongs, remember, start_uploader

logger = logging.getLogger(__name__)


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


@contextmanager
def followed(
    cfg: TrainConfig,
    folder: Path,
    journal: tracking.Journal,
    overrides: list[str],
    sweep: dict[str, str] | None,
) -> Iterator[None]:
    """Keep the run's status in its journal, and what MLflow has of the journal up to date."""
    uploader: Uploader | None = None
    status = "FAILED"
    seconds = cfg.tracking.drain_seconds
    journal.status("RUNNING")
    try:
        if cfg.tracking.mlflow:
            uploader = start_uploader(folder, cfg.tracking, about_run(cfg, overrides, sweep))
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        seconds = min(LAST_WORDS, seconds)
        raise
    finally:
        journal.status(status)
        if uploader is not None:
            drain(uploader, seconds, folder, cfg, sweep)


def upload_finished(
    cfg: TrainConfig,
    folder: Path,
    env_steps: int,
    overrides: list[str],
    sweep: dict[str, str] | None,
) -> None:
    """Upload what a finished run lacks in MLflow: its status, or its place in this sweep."""
    news = settle(folder, env_steps)
    if cfg.tracking.mlflow and (news or not belongs(folder, cfg.tracking, sweep)):
        uploader = start_uploader(folder, cfg.tracking, about_run(cfg, overrides, sweep))
        drain(uploader, cfg.tracking.drain_seconds, folder, cfg, sweep)


def drain(
    uploader: Uploader,
    seconds: float,
    folder: Path,
    cfg: TrainConfig,
    sweep: Mapping[str, str] | None,
) -> None:
    """Wait until the rest is uploaded; where it is not, also after Ctrl-C, print what to do."""
    try:
        if uploader.close(seconds):
            remember(folder, cfg.tracking, sweep)
    finally:
        if not uploader.complete:
            Progress(0).say(
                f"not everything was uploaded; this finishes it: python -m softmod.upload {folder}"
            )


def introduce(cfg: TrainConfig, folder: Path, resources: Resources, parts: Parts) -> str:
    """Return the line that a run begins with on the terminal."""
    begin = parts.clock.env_steps
    goes_on = f"; goes on at {begin:,} env steps" if begin else ""
    return (
        f"{folder}: {len(cfg.env.tasks)} tasks, {resources.describe()},"
        f" {parts.agent.describe()}{goes_on}"
    )


def warn(cfg: TrainConfig, resources: Resources, spec: EnvSpec, progress: Progress) -> None:
    """Print what may surprise: flawed success of tasks, other kernels or threads than before."""
    for task, flaw in flawed_success(spec.tasks, cfg.env.reward).items():
        progress.say(f"warning: success of {task} with env.reward={cfg.env.reward}: {flaw}")
    for difference in resources.differences():
        progress.say(f"warning: {difference}")


def draw_success(journal: tracking.Journal, folder: Path) -> None:
    """Draw the curves of success; a failure is a warning, because no picture is worth a run."""
    try:
        from softmod.tracking.figures import success_figure

        success_figure(journal, folder / "success.png")
    except Exception as error:  # matplotlib's, and those of what it calls
        logger.warning("success.png could not be drawn (%s)", one_line(error))
        return
    journal.artifact(folder / "success.png")


def conclude(
    cfg: TrainConfig, folder: Path, journal: tracking.Journal, clock: Clock, scores: list[TaskScore]
) -> Result:
    """Write the result into the run's folder and as artifacts; print and return it."""
    result = {
        "env_steps": clock.env_steps,
        "seconds": clock.seconds,
        "stopped_at": cfg.run.stop_at if clock.solved(cfg.run.stop_at) else None,
        "stopped_by_callback": clock.stopped,
        "success_rate": mean_success(scores),
        "scores": [score.as_dict() for score in scores],
    }
    with checkpoint.writing(folder / "evaluation.json"):
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    journal.artifact(folder / "evaluation.json")
    draw_success(journal, folder)
    journal.artifact(folder / "checkpoints" / "best", under="checkpoints")
    with checkpoint.writing(folder / "result.json"):
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    minutes = clock.seconds / 60
    print_table(scores, f"{folder}: {clock.env_steps:,} env steps in {minutes:.1f} minutes")
    return Result(folder, scores, clock.env_steps, clock.seconds)
