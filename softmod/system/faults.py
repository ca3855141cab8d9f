"""Points at which the tests let a process die.

Nothing happens unless SOFTMOD_FAULT names one, as in `point:3`.
"""

from __future__ import annotations

import os
import signal

armed = os.environ.get("SOFTMOD_FAULT", "")  # the point, and which of its turns
_turns: dict[str, int] = {}


def point(name: str) -> None:
    """Die here, as by `kill -9`, if this is the turn that was asked for."""
    if armed:
        _turns[name] = _turns.get(name, 0) + 1
        if armed == f"{name}:{_turns[name]}":
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
