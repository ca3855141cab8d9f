"""The names of metrics that the package itself reads or writes.

What an agent returns is named by its keys: `train/<key>`, or `train/<key>/<task>`
(`tracking.metrics`).
"""

from __future__ import annotations

SUCCESS_MEAN = "eval/success_rate/mean"
ENV_STEPS_PER_SECOND = "time/env_steps_per_second"
UPDATES_PER_SECOND = "time/updates_per_second"
WAIT_FOR_WORKERS = "time/wait_for_workers"
WAIT_FOR_LEARNER = "time/wait_for_learner"
TRAINING_SECONDS = "time/seconds"  # of training so far, over all sessions of the run
GRADIENTS = "gradients/"  # beginning of the cosines between tasks' gradients
OWN = ("eval/", "train/", "routing/", GRADIENTS, "time/", "system/")  # beginnings of all names
WALL_CLOCK = ("time/", "system/")  # beginnings of what depends on the machine, not on the run alone


def success_rate(task: str) -> str:
    return f"eval/success_rate/{task}"


def eval_return(task: str) -> str:
    """Of an evaluation's episode up to success or the horizon."""
    return f"eval/return/{task}"


def episode_return(task: str) -> str:
    return f"train/episode_return/{task}"


def train_success_rate(task: str) -> str:
    """The share of the task's last training episodes that reached success, with exploration."""
    return f"train/success_rate/{task}"


def physics_faults(task: str) -> str:
    """Count the episodes that were cut short because the physics broke; only where
    there were any.
    """
    return f"train/physics_faults/{task}"


def routing_entropy(layer: int) -> str:
    return f"routing/entropy/layer_{layer}"
