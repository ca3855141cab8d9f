"""The log of a run: writes metrics to the journal and shows progress on the terminal."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softmod.clock import Clock
from softmod.errors import ConfigError, NumericalError
from softmod.spec import EnvSpec, Rollout, TaskScore, mean_success
from softmod.system import hardware as machine
from softmod.tracking import journal as tracking
from softmod.tracking import names
from softmod.tracking.console import Progress

TOLERATED_FAULTS = 20  # episodes per run that may be cut short because their physics broke
RECENT = 20  # training episodes per task that the success rate is averaged over


class Log:
    """Collects the metrics of rounds, and writes them to the journal when due.

    Metrics are copied from the device only when they are written. Each write contains: the losses
    of the last update; the mean return of the episodes that ended since the last write; the success
    rate of each task's last training episodes; steps and updates per second of the time spent in
    rounds; and waiting times as fractions of that time.

    Args:
        journal: the run's journal.
        spec: shapes of the task set.
        progress: display on the terminal.
        system_metrics: also log memory and processor time of this process and its descendants.
    """

    def __init__(
        self,
        journal: tracking.Journal,
        spec: EnvSpec,
        progress: Progress,
        system_metrics: bool = True,
    ) -> None:
        self.journal = journal
        self.spec = spec
        self.progress = progress
        self.usage = machine.Usage(os.getpid()) if system_metrics else None
        self.metrics: dict[str, Tensor] = {}
        self.returns: dict[int, list[float]] = defaultdict(list)
        self.successes: dict[int, deque[bool]] = defaultdict(partial(deque, maxlen=RECENT))
        self.faults: Counter[str] = Counter()  # physics faults by task, over the whole run
        self.steps = self.updates = 0
        self.seconds = 0.0
        self.waited = {"workers": 0.0, "learner": 0.0}

    def begin(self) -> None:
        """Start the timer of a round."""
        self.began = time.monotonic()

    @contextmanager
    def waiting_for_workers(self) -> Iterator[None]:
        """Time the learner's wait for the workers within this context."""
        start = time.monotonic()
        yield
        self.waited["workers"] += time.monotonic() - start

    def round(
        self, clock: Clock, metrics: dict[str, Tensor], rollout: Rollout, updates: int
    ) -> None:
        """Add a round to the log, and update the progress display.

        Args:
            clock: the run's clock.
            metrics: metrics of the last update, on the device.
            rollout: the round's experience.
            updates: number of updates in the round.

        Raises:
            NumericalError: too many episodes were cut short because their physics broke.
        """
        self.metrics |= metrics
        for episode in rollout.episodes:
            self.returns[episode.task].append(episode.episode_return)
            self.successes[episode.task].append(episode.success)
        for fault in rollout.faults:
            self.faults[self.spec.tasks[fault.task]] += 1
        took = time.monotonic() - self.began
        self.steps = self.steps + rollout.env_steps
        self.updates = self.updates + updates
        self.seconds = self.seconds + took
        self.waited["learner"] += max(0.0, took - rollout.seconds)
        recent = self._train_success().values()
        learning = sum(recent) / len(recent) if recent else None
        self.progress.show(clock, self.steps / self.seconds, self.updates / self.seconds, learning)
        check_physics(self.faults)

    def write(self, clock: Clock) -> None:
        """Write the metrics since the last write to the journal.

        Raises:
            SaveError: the third write in a row failed.
        """
        # Success first: MLflow lists metrics in the order in which it first got them.
        episodes = self._episodes()
        values = episodes | by_name(self.metrics, self.spec) | episodes | self._rates()
        values |= {names.physics_faults(task): count for task, count in self.faults.items()}
        if self.usage is not None:
            values |= {f"{names.USAGE}{name}": use for name, use in self.usage.read().items()}
        values[names.TRAINING_SECONDS] = clock.seconds
        self.journal.metrics(values, clock.env_steps)
        self._clear()

    def evaluation(
        self, clock: Clock, scores: list[TaskScore], routes: Sequence[Tensor] = ()
    ) -> None:
        """Write an evaluation to the journal, and print its scores.

        Args:
            clock: the run's clock.
            scores: scores of all tasks.
            routes: routing probabilities `[task, target, source]` per layer.

        Raises:
            SaveError: the third write in a row failed.
        """
        values = {names.success_rate(score.task): score.success_rate for score in scores}
        values |= {names.eval_return(score.task): score.episode_return for score in scores}
        values[names.SUCCESS_MEAN] = mean_success(scores)
        values[names.TRAINING_SECONDS] = clock.seconds
        self.journal.metrics(values, clock.env_steps)
        if routes:
            self.journal.routes(
                self.spec.tasks, [layer.tolist() for layer in routes], clock.env_steps
            )
        self.progress.evaluation(clock, scores)

    def own_metrics(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Write metrics of a callback.

        Raises:
            ConfigError: a name is one of softmod's own, or a value is not a number.
        """
        for name, value in values.items():
            if name.startswith(names.OWN):
                raise ConfigError(
                    f"metric {name}: names that begin with {', '.join(names.OWN)} are softmod's own"
                )
            try:
                math.isfinite(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"metric {name}={value!r:.100}: must be a number") from error
        self.journal.metrics(values, clock.env_steps)

    def evaluated(self, clock: Clock) -> bool:
        """Return True if the journal has an evaluation at this step."""
        return clock.env_steps in self.journal.record.values.get(names.SUCCESS_MEAN, {})

    def state(self) -> dict[str, Any]:
        """Return the unwritten metrics and the fault counts, for a checkpoint."""
        return {
            "metrics": {name: tensor.tolist() for name, tensor in self.metrics.items()},
            "returns": {str(task): returns for task, returns in self.returns.items()},
            "successes": {str(task): list(successes) for task, successes in self.successes.items()},
            "faults": dict(self.faults),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.metrics = {name: torch.tensor(values) for name, values in state["metrics"].items()}
        self.faults = Counter(state["faults"])
        for task, successes in state["successes"].items():
            self.successes[int(task)].extend(bool(success) for success in successes)
        self.returns = defaultdict(
            list, {int(task): list(returns) for task, returns in state["returns"].items()}
        )

    def _clear(self) -> None:
        for name in [name for name in self.metrics if name.startswith(names.GRADIENTS)]:
            del self.metrics[name]  # measured once for each log, not by every update
        self.steps = self.updates = 0
        self.seconds = 0.0
        self.waited = {"workers": 0.0, "learner": 0.0}

    def _episodes(self) -> dict[str, float]:
        values = {
            names.episode_return(self.spec.tasks[task]): sum(returns) / len(returns)
            for task, returns in sorted(self.returns.items())
        }
        self.returns.clear()
        return self._train_success() | values

    def _train_success(self) -> dict[str, float]:
        """Return the fraction of each task's last training episodes that reached success."""
        return {
            names.train_success_rate(self.spec.tasks[task]): sum(successes) / len(successes)
            for task, successes in sorted(self.successes.items())
        }

    def _rates(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        return {
            names.ENV_STEPS_PER_SECOND: self.steps / self.seconds,
            names.UPDATES_PER_SECOND: self.updates / self.seconds,
            names.WAIT_FOR_WORKERS: self.waited["workers"] / self.seconds,
            names.WAIT_FOR_LEARNER: self.waited["learner"] / self.seconds,
        }


def check_physics(faults: Mapping[str, int]) -> None:
    """Check that few enough episodes were cut short because their physics broke.

    Args:
        faults: number of such episodes, by task.

    Raises:
        NumericalError: there are more than `TOLERATED_FAULTS`.
    """
    if sum(faults.values()) > TOLERATED_FAULTS:
        counts = ", ".join(f"{task} {count}" for task, count in sorted(faults.items()))
        raise NumericalError(
            f"the physics broke in more than {TOLERATED_FAULTS} episodes ({counts})"
        )


def by_name(metrics: dict[str, Tensor], spec: EnvSpec) -> dict[str, float]:
    """Return an agent's metrics under their names.

    A vector with a number for each task is named by tasks, routing entropies by layers, and
    whatever has another shape by its indices.
    """
    values: dict[str, float] = {}
    for name, tensor in metrics.items():
        key = name if "/" in name else f"train/{name}"
        numbers = tensor.float().flatten().tolist()
        if tensor.dim() == 0:
            labels = [key]
        elif key == "train/routing_entropy":
            labels = [names.routing_entropy(layer) for layer in range(1, len(numbers) + 1)]
        elif tensor.shape == (spec.num_tasks,):
            labels = [f"{key}/{task}" for task in spec.tasks]
        else:
            labels = [f"{key}/{index}" for index in range(len(numbers))]
        values |= dict(zip(labels, numbers, strict=True))
    return values
