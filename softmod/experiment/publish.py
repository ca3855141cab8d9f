"""Output of a run besides its metrics: configuration, status, result files, terminal, upload."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from softmod.checkpoint import files as checkpoint
from softmod.clock import Clock
from softmod.config.identity import as_values, flat, identity
from softmod.config.schema import TrackingConfig, TrainConfig
from softmod.config.trust import foreign
from softmod.envs.tasks import flawed_success
from softmod.errors import ConfigError, SaveError, one_line
from softmod.experiment.callbacks import Callback
from softmod.experiment.resources import Resources
from softmod.experiment.resume import write_missing_status
from softmod.experiment.session import Metrics, Parts, Session
from softmod.spec import EnvSpec, Result, Rollout, TaskScore, mean_success
from softmod.system import hardware as machine
from softmod.system import slurm
from softmod.system.files import network_file_system
from softmod.tracking import dashboard
from softmod.tracking import journal as tracking
from softmod.tracking import mlflow_store as store
from softmod.tracking.console import Progress, print_table
from softmod.tracking.descriptions import key_of, run_name
from softmod.tracking.model import POLICY
from softmod.tracking.redact import without_passwords
from softmod.tracking.transcript import TRANSCRIPT, Transcript
from softmod.tracking.uploader import (
    Uploader,
    is_uploaded,
    mark_uploaded,
    start_uploader,
    uploaded_experiment,
)

logger = logging.getLogger(__name__)

# overrides that are not part of a run's name, by key and by prefix
SHOWN_ELSEWHERE = ("env", "experiment", "name", "run", "run.folder", "sweep")
UNIMPORTANT = ("tracking", "hydra.")


def mlflow_metadata(
    cfg: TrainConfig, overrides: list[str], sweep: dict[str, str] | None
) -> dict[str, Any]:
    """Return the run's experiment, name and sweep for MLflow.

    The name begins with what differs from the other runs of its sweep. Without a sweep it lists
    the overrides, except those that the experiment shows already.
    """
    keys = (sweep or {}).get("swept", "").split(", ")
    swept = [line for line in overrides if key_of(line) in keys]
    others = [
        line
        for line in overrides
        if key_of(line) not in SHOWN_ELSEWHERE and not line.startswith(UNIMPORTANT)
    ]
    params = {"model": cfg.model, "seed": cfg.seed}
    return {
        "experiment": cfg.tracking.experiment or cfg.env.name,
        "run_name": run_name(params, swept, [] if sweep else others)[: store.MAX_NAME],
        "sweep": sweep,
    }


def tell_about(journal: tracking.Journal, cfg: TrainConfig, folder: Path) -> None:
    """Write `config.yaml`, and log configuration, versions and group to the journal.

    Raises:
        SaveError: the configuration cannot be written.
    """
    values = without_passwords(as_values(cfg))
    with checkpoint.writing(folder / "config.yaml"):
        (folder / "config.yaml").write_text(
            OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8"
        )
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
    """Log the run's status, RUNNING until it ends, and upload the journal in the background."""
    uploader: Uploader | None = None
    status = "FAILED"
    journal.status("RUNNING")
    try:
        if cfg.tracking.mlflow:
            uploader = start_uploader(folder, cfg.tracking, mlflow_metadata(cfg, overrides, sweep))
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with suppress(SaveError):  # the journal cannot be written, which was reported
            journal.artifact(folder / TRANSCRIPT)
        journal.status(status)
        if uploader is not None:
            drain(uploader, status == "KILLED", folder, cfg, sweep)


class Announce(Callback):
    """Prints the dashboard's address once the uploader has found the run's experiment.

    Args:
        cfg: configuration of the run.
        progress: display on the terminal.
    """

    def __init__(self, cfg: TrainConfig, progress: Progress) -> None:
        self.cfg = cfg
        self.progress = progress
        self.announced = not cfg.tracking.mlflow

    def on_round_end(self, session: Session, metrics: Metrics, rollout: Rollout) -> None:
        """Print the address, once."""
        if not self.announced and (line := dashboard_line(self.cfg, session.folder)):
            self.progress.say(line)
            self.announced = True


def dashboard_line(cfg: TrainConfig, folder: Path) -> str | None:
    """Return the line with the dashboard's address; None as long as MLflow was not reached."""
    uri = store.store_uri(cfg.tracking.uri)
    experiment = uploaded_experiment(folder, uri)
    return dashboard.line(uri, experiment) if experiment else None


def upload_finished(
    cfg: TrainConfig,
    folder: Path,
    env_steps: int,
    overrides: list[str],
    sweep: dict[str, str] | None,
) -> None:
    """Upload what MLflow lacks of a finished run, such as its membership in this sweep."""
    written = write_missing_status(folder, env_steps)
    if cfg.tracking.mlflow and (written or not is_uploaded(folder, cfg.tracking, sweep)):
        uploader = start_uploader(folder, cfg.tracking, mlflow_metadata(cfg, overrides, sweep))
        drain(uploader, False, folder, cfg, sweep)


def drain(
    uploader: Uploader,
    interrupted: bool,
    folder: Path,
    cfg: TrainConfig,
    sweep: Mapping[str, str] | None,
) -> None:
    """Wait until the upload is complete, and print the dashboard's address.

    If it is not complete, print the command that completes it instead.

    Args:
        uploader: the run's uploader.
        interrupted: wait only briefly.
        folder: the run's folder.
        cfg: configuration of the run.
        sweep: id and name of the sweep that the run belongs to.
    """
    try:
        if uploader.close(cfg.tracking.drain_seconds, interrupted):
            mark_uploaded(folder, cfg.tracking, sweep)
    finally:
        line = dashboard_line(cfg, folder)
        if not uploader.complete:
            reason = f" ({uploader.reason})" if uploader.reason else ""
            line = (
                f"upload to MLflow incomplete{reason}; complete it with:"
                f" python -m softmod.upload {shlex.quote(str(folder))}"
            )
        if line:
            Progress(0, transcript=Transcript(folder)).say(line)


def introduce(cfg: TrainConfig, folder: Path, resources: Resources, parts: Parts) -> str:
    """Return the first line on the terminal: folder, tasks, resources and networks."""
    begin = parts.clock.env_steps
    resumes = f"; resumes at {begin:,} env steps" if begin else ""
    return (
        f"{folder}: {len(cfg.env.tasks)} tasks, {resources.describe()},"
        f" {parts.agent.describe()}{resumes}"
    )


def warn(cfg: TrainConfig, resources: Resources, spec: EnvSpec, progress: Progress) -> None:
    """Print warnings: tasks with a flawed success signal, resources that changed or lie idle, a
    store that several nodes would damage.
    """
    for task, flaw in flawed_success(spec.tasks, cfg.env.reward).items():
        progress.say(f"warning: success of {task} with env.reward={cfg.env.reward}: {flaw}")
    for difference in resources.differences():
        progress.say(f"warning: {difference}")
    for idle in _idle_gpus(resources):
        progress.say(f"warning: {idle}")
    for shared in _shared_store(cfg.tracking):
        progress.say(f"warning: {shared}")


def _idle_gpus(resources: Resources) -> Iterator[str]:
    """Yield a warning if this job of SLURM trains on the CPU of a node with GPUs."""
    if resources.device == "none" and (why := slurm.idle_gpus()):
        yield (
            f"this job trains on the CPU, but {why}; fabric=cuda needs a PyTorch with CUDA and"
            " hydra.launcher.gpus_per_node=1 (sbatch --gpus-per-node=1)"
        )


def _shared_store(cfg: TrackingConfig) -> Iterator[str]:
    """Yield a warning if a job of SLURM tracks to an sqlite file on a network file system."""
    path = store.database(store.store_uri(cfg.uri)) if cfg.mlflow and slurm.number() else None
    if path and (kind := network_file_system(path)):
        yield (
            f"{path} lies on a network file system ({kind}), where jobs on several nodes can"
            " damage it; set tracking.uri to the address of a server, or tracking=journal"
        )


def draw_success(journal: tracking.Journal, folder: Path) -> None:
    """Draw the success curves; a failure only logs a warning, so that it cannot end the run."""
    try:
        from softmod.tracking.figures import success_figure

        success_figure(journal, folder / "success.png")
    except Exception as error:  # matplotlib's, and those of what it calls
        logger.warning("success.png could not be drawn (%s)", one_line(error))
        return
    journal.artifact(folder / "success.png")


def write_policy(journal: tracking.Journal, folder: Path) -> None:
    """Write the best policy as `policy.onnx`, which becomes a model in MLflow.

    A failure only logs a warning, so that it cannot end the run.
    """
    from softmod.checkpoint.load import actor_of
    from softmod.networks.portable import ONNX, require, save_onnx

    best = folder / "checkpoints" / "best"
    try:
        require(*ONNX)
        metadata = checkpoint.verify(best)
        actor = actor_of(best, metadata, foreign(metadata["config"]))
        save_onnx(actor, metadata["spec"]["tasks"], folder / POLICY)
    except ConfigError as error:
        Progress(0).say(f"no model of the policy in MLflow: {error}")
    except Exception as error:  # of the exporter, for a network of the user
        logger.warning("%s could not be written (%s)", POLICY, one_line(error))
    else:
        journal.artifact(folder / POLICY)


def conclude(
    cfg: TrainConfig, folder: Path, journal: tracking.Journal, clock: Clock, scores: list[TaskScore]
) -> Result:
    """Write the result files, log them as artifacts, print the table of scores; return the result.

    `result.json` is written last: it marks the run as finished.

    Raises:
        SaveError: a file cannot be written.
    """
    result = {
        "env_steps": clock.env_steps,
        "seconds": clock.seconds,
        "stopped_at": cfg.run.stop_at if clock.solved(cfg.run.stop_at) else None,
        "stopped_by_callback": clock.stopped,
        "success_rate": mean_success(scores),
        "scores": [score.as_dict() for score in scores],
    }
    with checkpoint.writing(folder / "evaluation.json"):
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    journal.artifact(folder / "evaluation.json")
    draw_success(journal, folder)
    journal.artifact(folder / "checkpoints" / "best", under="checkpoints")
    if cfg.tracking.mlflow and cfg.tracking.model:
        write_policy(journal, folder)
    with checkpoint.writing(folder / "result.json"):
        (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    minutes = clock.seconds / 60
    title = f"{folder}: {clock.env_steps:,} env steps in {minutes:.1f} minutes"
    print_table(scores, title, Transcript(folder))
    return Result(folder, scores, clock.env_steps, clock.seconds)
