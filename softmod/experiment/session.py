"""One session of a run: what is pending from the session before, and what is due after a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from jaxtyping import Float
from torch import Tensor

from softmod.agent.replay import Replay
from softmod.checkpoint.saver import PendingWork, Saver
from softmod.clock import Clock, Schedule
from softmod.config.schema import RunConfig
from softmod.errors import UpdateError
from softmod.experiment.callbacks import Callback
from softmod.spec import Rollout, TaskScore, mean_success
from softmod.system import signals
from softmod.tracking.metrics import Log
from softmod.workers.pool import Workers

Weights = Float[Tensor, " number"]
Metrics = dict[str, Tensor]
TOLERATED = 10  # updates in a row that may be skipped because they are not finite


class Agent(Protocol):
    """Answer what the loop asks of an agent."""

    updates: int  # made so far

    def policy(self) -> Weights:
        """Return a frozen copy of the acting policy's weights, flat, on the CPU."""

    def learn(
        self, replay: Replay, updates: int, stop: Callable[[], bool], examine: bool
    ) -> Metrics:
        """Make updates until told to stop; return the metrics of the last one."""

    def observe(self, rollout: Rollout) -> None:
        """Take in a round's experience: statistics of observations, returns and success."""

    def routes(self, replay: Replay) -> list[Tensor]:
        """Return routing probabilities per layer, `[task, target, source]`; none: an empty list."""

    def skipped_in_a_row(self) -> int:
        """Return how many of the last updates were not finite."""

    def describe(self) -> str:
        """Return the sizes of the networks, for the terminal."""


@dataclass(frozen=True)
class Parts:
    """Hold what a run is built of."""

    agent: Agent
    replay: Replay
    workers: Workers
    clock: Clock
    schedule: Schedule
    log: Log
    saver: Saver
    callbacks: tuple[Callback, ...] = ()


@dataclass(frozen=True)
class Updates:
    """Ask, in each round, for so many updates of its agent on what its replay holds."""

    agent: Agent
    replay: Replay
    number: int
    examine: bool
    env_steps: int  # of the run so far

    def make(self) -> Metrics:
        """Make them, until a signal asks the run to stop; return the metrics of the last one."""
        return self.agent.learn(self.replay, self.number, signals.stopping, self.examine)


class Session:
    """Answer what the loop asks between its steps; save and evaluate when that is due.

    A run that was stopped within a round, or within an evaluation, has pending work: the round is
    collected again with the policy that it had, and lacks the updates that were made already.

    Args:
        run: how long, how much of it, how often.
        parts: the parts of the run, as they are now or as a checkpoint had them.
    """

    def __init__(self, run: RunConfig, parts: Parts) -> None:
        self.run = run
        self.parts = parts
        self.total = run.steps_per_task * parts.replay.spec.num_tasks
        self.pending = parts.saver.pending
        self.due = 0  # updates of this round
        self.made_before = 0  # updates before this round

    # --- for callbacks ----------------------------------------------------------------------------

    @property
    def env_steps(self) -> int:
        """Return the environment steps so far, over all tasks."""
        return self.parts.clock.env_steps

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return self.parts.saver.run

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Log metrics of a callback at the current environment step.

        Args:
            values: by their names, as in `{"mine/distance": 0.3}`.

        Raises:
            ConfigError: a name is one of softmod's own, or a value is no number.
        """
        self.parts.log.own_metrics(self.parts.clock, values)

    def stop(self) -> None:
        """End the training after this round, as `run.stop_at` does; the last evaluation follows."""
        self.parts.clock.stopped = True

    # --- a round ----------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Return whether there is another round.

        Where an evaluation ends the training, one more round comes before the last evaluation: no
        two evaluations at one step.
        """
        clock = self.parts.clock
        log = self.parts.log
        if clock.env_steps >= self.total:
            return False
        if not ended(self.run, clock):
            return True
        return log.evaluated(clock) and not self.pending.over

    def policy(self) -> Weights:
        """Return the weights that this round is collected with."""
        pending = self.pending.policy
        return self.parts.agent.policy() if pending is None else pending

    def uniform(self) -> bool:
        """Return whether this round's actions are drawn uniformly."""
        warming_up = self.parts.schedule.warming_up(self.parts.clock.env_steps)
        return warming_up and self.run.warmup_policy == "uniform"

    def updates(self) -> Updates:
        """Return this round's updates, without those that were made already."""
        agent = self.parts.agent
        clock = self.parts.clock
        schedule = self.parts.schedule
        self.due = schedule.updates(clock.env_steps)
        self.made_before = agent.updates - self.pending.updates
        examine = clock.will_pass(self.run.log_every, schedule.env_steps)
        number = self.due - self.pending.updates
        return Updates(agent, self.parts.replay, number, examine, clock.env_steps)

    def stop_within_round(self, policy: Weights) -> None:
        """Save and stop where updates are missing; else nothing is pending any more.

        Raises:
            StoppedError: a signal asked for it.
        """
        made = self.parts.agent.updates - self.made_before
        if made < self.due:
            self._stop(PendingWork(policy, made))
        self.pending = PendingWork()

    # --- after a round ----------------------------------------------------------------------------

    def log(self, metrics: Metrics, rollout: Rollout) -> None:
        """Log the round.

        Raises:
            UpdateError: too many updates in a row were not finite.
            NumericalError: the physics broke too often.
        """
        clock = self.parts.clock
        log = self.parts.log
        log.round(clock, metrics, rollout, self.due)
        if clock.passed(self.run.log_every) or clock.passed(self.run.save_every):
            self._write()
        for callback in self.parts.callbacks:
            callback.on_round_end(self, metrics, rollout)

    def evaluate(self) -> None:
        """Evaluate if that is due."""
        clock = self.parts.clock
        due = clock.passed(self.run.eval_every) and clock.env_steps < self.total
        if due and not ended(self.run, clock):
            self._evaluate(self.run.eval_goals, PendingWork(evaluation=True))

    def evaluate_what_is_pending(self) -> None:
        """Evaluate if the run was stopped within an evaluation."""
        if self.pending.evaluation:
            self._evaluate(self.run.eval_goals, PendingWork(evaluation=True))

    def save(self) -> None:
        """Save if that is due, or if a signal asks the run to stop.

        Raises:
            StoppedError: a signal asked for it.
        """
        clock = self.parts.clock
        saver = self.parts.saver
        if signals.stopping():
            self._stop(PendingWork())
        if clock.passed(self.run.save_every):
            self._saved(saver.try_save(clock, self.parts.log))

    def end(self) -> list[TaskScore]:
        """Save, evaluate for the last time and save again; return the scores.

        What is logged at the end is of weights that are on the disk.
        """
        self._write()
        last = PendingWork(over=True)
        self._save(last)
        scores = self._evaluate(self.run.final_eval_goals, last)
        self._save(last)
        return scores

    # --- parts of these ---------------------------------------------------------------------------

    def _write(self) -> None:
        self.parts.log.write(self.parts.clock)
        skipped = self.parts.agent.skipped_in_a_row()
        if skipped >= TOLERATED:
            raise UpdateError(f"the last {skipped} updates were not finite and changed nothing")

    def _evaluate(self, goals: int, pending: PendingWork) -> list[TaskScore]:
        """Evaluate and log; a run that is stopped meanwhile saves it as pending."""
        parts = self.parts
        try:
            scores = parts.workers.evaluate(parts.agent.policy(), goals)
        except signals.StoppedError:
            self._stop(pending)
        parts.clock.evaluated(mean_success(scores))
        parts.log.evaluation(parts.clock, scores, parts.agent.routes(parts.replay))
        parts.saver.keep_best(parts.clock, scores)
        for callback in parts.callbacks:
            callback.on_evaluation(self, scores)
        return scores

    def _save(self, pending: PendingWork) -> None:
        parts = self.parts
        self._saved(parts.saver.save(parts.clock, parts.log, pending))

    def _saved(self, checkpoint: Path | None) -> None:
        """Hand a new checkpoint to the callbacks; None: the disk refused it."""
        if checkpoint is not None:
            for callback in self.parts.callbacks:
                callback.on_save(self, checkpoint)

    def _stop(self, pending: PendingWork) -> NoReturn:
        parts = self.parts
        parts.saver.stop(parts.clock, parts.log, pending)


def ended(run: RunConfig, clock: Clock) -> bool:
    """Return whether `run.max_minutes` of training are over, two evaluations running reached
    `run.stop_at`, or a callback stopped the training.
    """
    out_of_time = run.max_minutes is not None and clock.tick() >= 60.0 * run.max_minutes
    return out_of_time or clock.stopped or clock.solved(run.stop_at)
