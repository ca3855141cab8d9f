"""Signal handling of a run.

Ctrl-C ends the run at once, without saving. It raises KeyboardInterrupt and also sets a flag,
because an exception raised in a destructor, in a callback or during the import of compiled code can
get lost. The signals in `STOPS` only set a flag: the loop saves between two updates and raises
`StoppedError`. Whether a SLURM job then runs again: `softmod/system/slurm.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Schedulers send SIGTERM, SIGUSR1, SIGUSR2 and SIGXCPU; a closed terminal and a lost ssh, SIGHUP.
NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
STOPPED = 143  # the exit code

_interrupted = threading.Event()
_stop: list[signal.Signals] = []
_followers: list[Callable[[int], None]] = []


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
    before = handle_all()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end and number in STOPS else handler)
        _interrupted.clear()
        _stop.clear()


def handle_all() -> dict[signal.Signals, Any]:
    """Handle signals as described above from now on; return the handlers before.

    Within a job's own process, which may run several jobs: a signal stops the later ones too.
    """
    before: dict[signal.Signals, Any] = {}
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            before[number] = signal.signal(number, _stop_later)
    before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    return before


@contextmanager
def passed_on(to: Callable[[int], None]) -> Iterator[None]:
    """Call a function with each signal of `STOPS` that is received; used within `handled`.

    Args:
        to: called with the signal's number; it may raise.
    """
    _followers.append(to)
    try:
        yield
    finally:
        _followers.remove(to)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Block SIGINT and the signals of `STOPS` for processes started within this context.

    Schedulers and terminals send these to all processes of a job. This thread receives those that
    arrive meanwhile when the context ends; the process may receive them in another thread.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOPS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # delivers the blocked ones


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let a Ctrl-C within this context take effect at its end.

    Blocking the signal is not enough: another thread of the process would receive it, and Python
    would raise KeyboardInterrupt in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


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


def received() -> tuple[signal.Signals, ...]:
    """Return the signals of `STOPS` that were received."""
    return tuple(_stop)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)


def _stop_later(number: int, frame: FrameType | None) -> None:
    _stop.append(signal.Signals(number))
    for follow in tuple(_followers):
        follow(number)
