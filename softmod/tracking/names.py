"""The names of metrics that the package itself reads or writes.

What an agent returns is named by its keys: `train/<key>`, or `train/<key>/<task>`
(`tracking.metrics`).
"""

from __future__ import annotations

SUCCESS_MEAN = "eval/success_rate/mean"  # over all tasks, in an evaluation
ENV_STEPS_PER_SECOND = "time/env_steps_per_second"  # over all tasks
UPDATES_PER_SECOND = "time/updates_per_second"  # of the learner
WAIT_FOR_WORKERS = "time/wait_for_workers"  # share of the time in which the learner waited
WAIT_FOR_LEARNER = "time/wait_for_learner"  # share of the time in which the workers waited
TRAINING_SECONDS = "time/seconds"  # seconds of training so far, over all sessions of the run
WALL_CLOCK = ("time/", "system/")  # beginnings of what depends on the machine, not on the run alone


def success_rate(task: str) -> str:
    """Return the name of a task's success rate in an evaluation."""
    return f"eval/success_rate/{task}"


def eval_return(task: str) -> str:
    """Return the name of a task's mean return in an evaluation, up to success or the horizon."""
    return f"eval/return/{task}"


def episode_return(task: str) -> str:
    """Return the name of a task's mean return in training episodes."""
    return f"train/episode_return/{task}"


def train_success_rate(task: str) -> str:
    """Return the name of a task's success rate in its last training episodes."""
    return f"train/success_rate/{task}"


def physics_faults(task: str) -> str:
    """Return the name of a task's number of episodes that broken physics cut short, if any."""
    return f"train/physics_faults/{task}"


def routing_entropy(layer: int) -> str:
    """Return the name of the mean entropy of a routing layer, in nats."""
    return f"routing/entropy/layer_{layer}"
