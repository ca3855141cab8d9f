"""A session of a run: work pending from the session before, and work due after each round."""

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
    """The agent as the loop uses it."""

    updates: int  # made so far

    def policy(self) -> Weights:
        """Return a frozen copy of the acting policy's weights, flat, on the CPU."""

    def learn(
        self, replay: Replay, updates: int, stop: Callable[[], bool], examine: bool
    ) -> Metrics:
        """Make updates until `stop` returns True; return the metrics of the last one."""

    def observe(self, rollout: Rollout) -> None:
        """Update the statistics of observations, returns and success with a round's experience."""

    def routes(self, replay: Replay) -> list[Tensor]:
        """Return routing probabilities `[task, target, source]` per layer; empty if none."""

    def skipped_in_a_row(self) -> int:
        """Return the number of consecutive non-finite updates up to the last one."""

    def describe(self) -> str:
        """Return the sizes of the networks, for the terminal."""


@dataclass(frozen=True)
class Parts:
    """The parts that a run is built of."""

    agent: Agent
    replay: Replay
    workers: Workers
    clock: Clock
    schedule: Schedule
    log: Log
    saver: Saver
    callbacks: tuple[Callback, ...] = ()
    in_turns: bool = False  # collect before learning rather than meanwhile


@dataclass(frozen=True)
class Updates:
    """The updates due in a round, and the agent and replay to make them with."""

    agent: Agent
    replay: Replay
    number: int
    examine: bool
    env_steps: int  # of the run so far

    def make(self) -> Metrics:
        """Make the updates until a signal requests a stop; return the metrics of the last one."""
        return self.agent.learn(self.replay, self.number, signals.stopping, self.examine)


class Session:
    """The loop's decisions between its steps; saves and evaluates when due.

    A run that was stopped within a round or an evaluation has pending work. A pending round is
    collected again with the same policy, and without the updates that were made already.

    Args:
        run: lengths and cadences of the run.
        parts: the parts of the run, new or restored from a checkpoint.
    """

    def __init__(self, run: RunConfig, parts: Parts) -> None:
        self.run = run
        self.parts = parts
        self.total = run.steps_per_task * parts.replay.spec.num_tasks
        self.pending = parts.saver.pending
        self.due = 0  # updates of this round
        self.made_before = 0  # updates before this round
        self.over = False  # the training has ended, and the last evaluation follows

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
            ConfigError: a name is one of softmod's own, or a value is not a number.
        """
        self.parts.log.own_metrics(self.parts.clock, values)

    def stop(self) -> None:
        """End the training after this round, as `run.stop_at` does; the last evaluation follows.

        No-op once the training has ended, so that a run can still be extended.
        """
        if not self.over:
            self.parts.clock.stopped = True

    # --- a round ----------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Return True if there is another round.

        If an evaluation ends the training, one more round is collected before the last evaluation,
        so that no two evaluations have the same step.
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
        """Return True if this round's actions are drawn uniformly."""
        warming_up = self.parts.schedule.warming_up(self.parts.clock.env_steps)
        return warming_up and self.run.warmup_policy == "uniform"

    def wait_for_workers(self, policy: Weights) -> None:
        """Wait until the round is collected; save and stop if a signal requests it.

        Raises:
            StoppedError: stopped by a signal, after saving.
        """
        try:
            with self.parts.log.waiting_for_workers():
                self.parts.workers.wait()
        except signals.StoppedError:
            self._stop(PendingWork(policy, self.pending.updates))

    def updates(self) -> Updates:
        """Return this round's updates, without those that were made already."""
        agent = self.parts.agent
        clock = self.parts.clock
        schedule = self.parts.schedule
        replay = self.parts.replay  # one that was lost is refilled first (run.resume=weights)
        self.due = schedule.updates(replay.written * replay.spec.num_tasks)
        self.made_before = agent.updates - self.pending.updates
        examine = clock.will_pass(self.run.log_every, schedule.env_steps)
        number = self.due - self.pending.updates
        return Updates(agent, self.parts.replay, number, examine, clock.env_steps)

    def stop_within_round(self, policy: Weights) -> None:
        """Save and stop if a signal cut the updates short; else clear the pending work.

        Raises:
            StoppedError: stopped by a signal, after saving.
        """
        made = self.parts.agent.updates - self.made_before
        if made < self.due:
            self._stop(PendingWork(policy, made))
        self.pending = PendingWork()

    # --- after a round ----------------------------------------------------------------------------

    def log(self, metrics: Metrics, rollout: Rollout) -> None:
        """Log the round; write the metrics if that is due.

        Raises:
            UpdateError: too many updates in a row were not finite.
            NumericalError: too many episodes were cut short because their physics broke.
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
        """Save if that is due; save and stop if a signal requests it.

        Raises:
            StoppedError: stopped by a signal, after saving.
        """
        clock = self.parts.clock
        saver = self.parts.saver
        if signals.stopping():
            self._stop(PendingWork())
        if clock.passed(self.run.save_every):
            self._saved(saver.try_save(clock, self.parts.log))

    def end(self) -> list[TaskScore]:
        """Save, evaluate for the last time and save again; return the scores.

        The first save guarantees that the evaluated weights are on disk.
        """
        self._write()
        self.over = True
        last = PendingWork(over=True)
        self._save(last)
        scores = self._evaluate(self.run.final_eval_goals, last)
        self._save(last)
        return scores

    # --- internals --------------------------------------------------------------------------------

    def _write(self) -> None:
        self.parts.log.write(self.parts.clock)
        skipped = self.parts.agent.skipped_in_a_row()
        if skipped >= TOLERATED:
            raise UpdateError(f"the last {skipped} updates were not finite and changed nothing")

    def _evaluate(self, goals: int, pending: PendingWork) -> list[TaskScore]:
        """Evaluate and log; if stopped meanwhile, save with the evaluation as pending work."""
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
    """Return True if training ends before `run.steps_per_task`.

    It does when `run.max_minutes` have passed, when two evaluations in a row reached `run.stop_at`,
    or when a callback stopped it.
    """
    out_of_time = run.max_minutes is not None and clock.tick() >= 60.0 * run.max_minutes
    return out_of_time or clock.stopped or clock.solved(run.stop_at)
