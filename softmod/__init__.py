"""Multi-task reinforcement learning with soft modularization."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from softmod.checkpoint.load import TrainedPolicy


def load(path: str | Path, allow: Iterable[str] = ()) -> TrainedPolicy:
    """The policy of a checkpoint or of a run's folder: `load(path).act(obs, task)`.

    `allow` names packages of your own that it may be built of.
    """
    from softmod.checkpoint import load as policy  # torch is imported only by those who need it

    return policy.load(path, allow)
