"""Multi-task reinforcement learning with soft modularization.

run = softmod.train(["env=mt10", "seed=3"])
policy = softmod.load(run.folder)
action = policy.act(obs, "reach-v3")
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softmod.checkpoint.load import TrainedPolicy, load
    from softmod.evaluate import evaluate
    from softmod.experiment.callbacks import Callback
    from softmod.experiment.session import Session
    from softmod.spec import Result, TaskScore
    from softmod.train import train

__all__ = [
    "Callback", "Result", "Session", "TaskScore", "TrainedPolicy", "evaluate", "load", "train",
]  # fmt: skip

# `train` and `evaluate` are modules that can be called: commands have the same names.
_PLACES = {
    "Callback": "softmod.experiment.callbacks",
    "Result": "softmod.spec",
    "Session": "softmod.experiment.session",
    "TaskScore": "softmod.spec",
    "TrainedPolicy": "softmod.checkpoint.load",
    "load": "softmod.checkpoint.load",
}

# These let the OpenMP library bind this process, and its workers with it, to one core as soon as
# torch is imported. Module files of clusters set them.
_bound = {
    name: os.environ.pop(name)
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
    if os.environ.get(name, "false").lower() not in ("", "false", "none", "disabled")
}
if _bound and "torch" not in sys.modules:
    import logging

    logging.getLogger(__name__).warning(
        "softmod: %s ignored: the learner and all workers would share one core",
        " ".join(f"{name}={value}" for name, value in _bound.items()),
    )


def __getattr__(name: str) -> Any:
    """Import a name of the interface when it is used: torch takes seconds."""
    if name in ("train", "evaluate"):
        return import_module(f"softmod.{name}")
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'softmod' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
