"""What a run does when it is told to end.

Ctrl-C ends it at once, without saving. It is raised, and remembered too, since an exception that
comes up in a destructor, in a callback or within the import of compiled code can get lost. The
signals of `STOPS` only set a flag: the loop saves between two updates and ends with
`StoppedError`. A job that SLURM warned with SIGUSR1 or SIGUSR2 asks to be queued again.
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
    """A signal asked the run to stop, and it has saved; `how` it goes on."""

    how = "the same command goes on from there"


@contextmanager
def heeded(to_the_end: bool = False) -> Iterator[None]:
    """Within this, signals are treated as above; only the main thread gets any.

    `to_the_end`: the process ends after this, and those that ask it to are not heard any more.
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
    """Processes started within this never see the signals to end: schedulers and terminals send
    them to everybody.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOPS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # what came meanwhile is seen now


def check() -> None:
    """To be asked each round, and of every failure: an import that an interrupt fell into fails in
    its own way, later.

    Raises:
        KeyboardInterrupt: there was one, and it got lost.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def leave_if_told() -> None:
    """Before training goes on, when there is nothing new to save.

    Raises:
        StoppedError: the run was told to stop.
        KeyboardInterrupt: there was one, and it got lost.
    """
    check()
    if stopping():
        raise StoppedError("stopped before training went on")


def stopping() -> bool:
    """Return whether the run was told to save and stop."""
    return bool(_stop)


def ending() -> bool:
    """Return whether a signal ends the run, at once or after saving."""
    return stopping() or _interrupted.is_set()


def requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Ask SLURM to queue this job again if SLURM warned it with SIGUSR1 or SIGUSR2 (submitit's);
    return the job's number if it was asked.

    Jobs that SLURM itself takes back, with SIGTERM, it also queues itself. Only the first task of a
    job asks.
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
    except OSError:  # there is no such command here
        return None
    return job if done.returncode == 0 else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)


def _stop_later(number: int, frame: FrameType | None) -> None:
    _stop.append(signal.Signals(number))
