"""Signal handling of a run.

Ctrl-C ends the run at once, without saving. It raises KeyboardInterrupt and also sets a flag,
because an exception raised in a destructor, in a callback or during the import of compiled code can
get lost. The signals in `STOPS` only set a flag: the loop saves between two updates and raises
`StoppedError`. A job that SLURM warned with SIGUSR1 or SIGUSR2 requests to be requeued.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Schedulers send SIGTERM, SIGUSR1, SIGUSR2 and SIGXCPU; a closed terminal and a lost ssh, SIGHUP.
NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
STOPPED = 143  # the exit code

_interrupted = threading.Event()
_stop: list[signal.Signals] = []


class StoppedError(KeyboardInterrupt):
    """The run was stopped by a signal, with its state saved.

    Attributes:
        how: how to resume, for the terminal.
    """

    how = "the same command resumes the run"


@contextmanager
def handled(to_the_end: bool = False) -> Iterator[None]:
    """Handle signals as described above within this context; a no-op outside the main thread.

    Args:
        to_the_end: the process ends after this context, so that the signals of `STOPS` are ignored
            from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            before[number] = signal.signal(number, _stop_later)
    before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end and number in STOPS else handler)
        _interrupted.clear()
        _stop.clear()


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Block SIGINT and the signals of `STOPS` for processes started within this context.

    Schedulers and terminals send these to all processes of a job. This process receives those that
    arrive meanwhile when the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOPS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # delivers the blocked ones


def check() -> None:
    """Raise a Ctrl-C that got lost; called each round, and upon every failure.

    An import that Ctrl-C interrupted may fail later, with another exception.

    Raises:
        KeyboardInterrupt: Ctrl-C was received.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def leave_if_told() -> None:
    """Raise if a signal was received; called before training, when there is nothing to save.

    Raises:
        StoppedError: a signal of `STOPS` was received.
        KeyboardInterrupt: Ctrl-C was received.
    """
    check()
    if stopping():
        raise StoppedError("stopped before training")


def stopping() -> bool:
    """Return True if a signal requested to save and stop."""
    return bool(_stop)


def ending() -> bool:
    """Return True if a signal ends the run, at once or after saving."""
    return stopping() or _interrupted.is_set()


def requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Requeue this job if SLURM warned it with SIGUSR1 or SIGUSR2 (submitit's); return its number,
    or None.

    SLURM itself requeues the jobs that it preempts with SIGTERM. Only the first task of a job
    sends the request.

    Args:
        environment: with SLURM's variables.
    """
    job = environment.get("SLURM_JOB_ID")
    warned = {signal.SIGUSR1, signal.SIGUSR2} & set(_stop)
    if not job or not warned or environment.get("SLURM_PROCID", "0") != "0":
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
    except OSError:  # scontrol is not installed
        return None
    return job if done.returncode == 0 else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)


def _stop_later(number: int, frame: FrameType | None) -> None:
    _stop.append(signal.Signals(number))
