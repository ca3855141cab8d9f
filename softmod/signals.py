"""Ctrl-C is raised at once, and remembered: an exception that comes up in a destructor or callback is ignored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def remembering_interrupts() -> Iterator[None]:
    """Within this, `check` knows of every Ctrl-C; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _seen.clear()


def check() -> None:
    """
    Raises:
        KeyboardInterrupt: there was one, and it got lost.
    """
    if _seen.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.set()
    signal.default_int_handler(number, frame)
