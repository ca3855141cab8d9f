"""Fault injection points, at which tests kill a process.

They do nothing unless SOFTMOD_FAULT names one and the count at which to die, as in
`checkpoint.written:3`.
"""

from __future__ import annotations

import os
import signal

armed = os.environ.get("SOFTMOD_FAULT", "")  # `<point>:<count>`
_turns: dict[str, int] = {}


def point(name: str) -> None:
    """Kill this process if SOFTMOD_FAULT names this point and its current count."""
    if armed:
        _turns[name] = _turns.get(name, 0) + 1
        if armed == f"{name}:{_turns[name]}":
            die()


def die() -> None:
    """Kill this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
