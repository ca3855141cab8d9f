"""Names of the metrics that the package itself writes or reads.

Metrics that an agent returns are named by their keys: `train/<key>`, or `train/<key>/<task>`
(`tracking.metrics.by_name`). MLflow groups charts by all that precedes the last `/`, in
alphabetical order, and lists the metrics of `system/` before all others: success comes first.
"""

from __future__ import annotations

SUCCESS = "eval/success_rate/"  # prefix of success in evaluations
SUCCESS_MEAN = "eval/success_rate/mean"  # over all tasks, in an evaluation; of a sweep: over runs
SUCCESS_IQM = "eval/success_rate/iqm"  # of a sweep: interquartile mean over all runs and tasks
ENV_STEPS_PER_SECOND = "time/env_steps_per_second"  # over all tasks
UPDATES_PER_SECOND = "time/updates_per_second"  # of the learner
WAIT_FOR_WORKERS = "time/wait_for_workers"  # share of the time in which the learner waited
WAIT_FOR_LEARNER = "time/wait_for_learner"  # share of the time in which the workers waited
TRAINING_SECONDS = "time/seconds"  # seconds of training so far, over all sessions of the run
GRADIENTS = "gradients/"  # prefix of the cosines between tasks' gradients
USAGE = "usage/"  # prefix of the use of processor and memory
EARLIER_USAGE = "system/"  # the same in journals of earlier versions
EVALUATED = "evaluate/"  # prefix of the results of `python -m softmod.evaluate`
OWN = (  # prefixes of all names
    "eval/", EVALUATED, "train/", "routing/", GRADIENTS, "time/", USAGE, EARLIER_USAGE,
)  # fmt: skip
WALL_CLOCK = ("time/", USAGE, EARLIER_USAGE)  # prefixes of metrics that depend on the machine


def success_rate(task: str) -> str:
    """Return the name of a task's success rate in an evaluation."""
    return f"{SUCCESS}{task}"


def eval_return(task: str) -> str:
    """Return the name of a task's mean return in an evaluation, up to success or the horizon."""
    return f"eval/undiscounted_return/{task}"


def evaluated_success_rate(task: str) -> str:
    """Return the name of a task's success rate, or "mean", in `python -m softmod.evaluate`."""
    return f"{EVALUATED}success_rate/{task}"


def evaluated_return(task: str) -> str:
    """Return the name of a task's mean return in `python -m softmod.evaluate`."""
    return f"{EVALUATED}undiscounted_return/{task}"


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
