"""Jobs of a sweep in other processes: how the command that waits for them can be stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from omegaconf import DictConfig

from softmod.errors import ConfigError, SoftmodError
from softmod.system import signals
from softmod.system.streams import complain
from softmod.tracking.mlflow_store import store_uri
from softmod.tracking.redact import redacted

IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
SLURM = f"{SUBMITIT}.submitit_launcher.SlurmLauncher"


def launcher(composed: DictConfig) -> str:
    """Return the class of the configured launcher."""
    return str(composed.hydra.launcher.get("_target_"))


@contextmanager
def waited_for(composed: DictConfig) -> Iterator[None]:
    """Wait for jobs that a launcher runs in other processes, in this context.

    A stop signal to the command also stops the jobs of a launcher whose processes belong to it
    (joblib): each saves, and the wait ends with them. Jobs of submitit go on without the command;
    those are named.

    Raises:
        StoppedError: a signal of `signals.STOPS` was received.
        KeyboardInterrupt: Ctrl-C was received.
    """
    if launcher(composed) == IN_THIS_PROCESS:
        yield
    elif launcher(composed).startswith(SUBMITIT):
        if launcher(composed) == SLURM:
            _warn_of_shared_sqlite(composed)
        with _left_running(composed):
            yield
    else:
        with signals.passed_on(_forward):
            yield
        if signals.stopping():
            stop = signals.StoppedError("stopped")
            stop.how = "the same command resumes the runs"
            raise stop


@contextmanager
def _left_running(composed: DictConfig) -> Iterator[None]:
    """Name the jobs of submitit that go on, if a signal ends this context."""
    began = time.time()
    folder = Path(composed.hydra.sweep.dir, ".submitit")
    try:
        with signals.passed_on(_stop_waiting):
            yield
    except KeyboardInterrupt as stop:
        how = _how_to_end(submitted(folder, began), launcher(composed) == SLURM)
        if not isinstance(stop, signals.StoppedError):
            complain(f"softmod: stopped waiting; {how}")
            raise
        stop.how = how
        raise


def submitted(folder: Path, since: float) -> list[str]:
    """List the numbers of the jobs that submitit submitted since a time, in order.

    Args:
        folder: of submitit, with a folder per job or job array.
        since: in seconds since the epoch.
    """
    files = [file for file in folder.glob("*/*_submitted.pkl") if file.stat().st_mtime >= since - 1]
    names = {file.name.removesuffix("_submitted.pkl") for file in files}
    return sorted(names, key=lambda name: [int(part) for part in name.split("_")])


def _how_to_end(jobs: list[str], slurm: bool) -> str:
    if not jobs:
        return "no job was submitted"
    first, *others = dict.fromkeys(job.partition("_")[0] for job in jobs)
    end = f"scancel {' '.join([first, *others])}" if slurm else f"kill {' '.join([first, *others])}"
    return (
        f"{len(jobs)} {'job goes' if len(jobs) == 1 else 'jobs go'} on ({', '.join(jobs[:20])}"
        f"{', ...' if len(jobs) > 20 else ''}); to stop them: {end}"
    )


def _stop_waiting(number: int) -> None:
    raise signals.StoppedError("stopped waiting")


def _forward(number: int) -> None:
    for child in psutil.Process().children():
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def explained(error: RuntimeError) -> Exception:
    """Return an error of submitit as one that is reported in a line; others as they are."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("sbatch: "):
        return ConfigError(f"SLURM does not take the jobs: {'; '.join(lines)}")
    if kinds & {"FailedSubmissionError", "UncompletedJobError"}:
        return SoftmodError(lines[0])
    return error


def _warn_of_shared_sqlite(composed: DictConfig) -> None:
    """Warn that jobs on several nodes would write to one sqlite file."""
    uri = store_uri(composed.tracking.uri)
    if composed.tracking.mlflow and uri.startswith("sqlite"):
        complain(
            f"softmod: warning: the jobs share {redacted(uri)}; on several nodes, that can damage"
            " an sqlite file. Set tracking.uri to the address of a server, or tracking=journal"
        )
