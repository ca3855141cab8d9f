"""Names of the metrics that the package itself writes or reads.

Metrics that an agent returns are named by their keys: `train/<key>`, or `train/<key>/<task>`
(`tracking.metrics.by_name`).
"""

from __future__ import annotations

SUCCESS_MEAN = "eval/success_rate/mean"  # over all tasks, in an evaluation
ENV_STEPS_PER_SECOND = "time/env_steps_per_second"  # over all tasks
UPDATES_PER_SECOND = "time/updates_per_second"  # of the learner
WAIT_FOR_WORKERS = "time/wait_for_workers"  # share of the time in which the learner waited
WAIT_FOR_LEARNER = "time/wait_for_learner"  # share of the time in which the workers waited
TRAINING_SECONDS = "time/seconds"  # seconds of training so far, over all sessions of the run
GRADIENTS = "gradients/"  # prefix of the cosines between tasks' gradients
OWN = ("eval/", "train/", "routing/", GRADIENTS, "time/", "system/")  # prefixes of all names
WALL_CLOCK = ("time/", "system/")  # prefixes of metrics that depend on the machine


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
    """Return the name of a task's number of episodes cut short because their physics broke.

    It is logged only if there are any.
    """
    return f"train/physics_faults/{task}"


def routing_entropy(layer: int) -> str:
    """Return the name of the mean entropy of a routing layer, in nats."""
    return f"routing/entropy/layer_{layer}"
