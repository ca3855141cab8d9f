"""The loop: the one place where the parts meet."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from softmod.agent.replay import Replay
from softmod.checkpoint.saver import Begun, Saver
from softmod.clock import Clock, Schedule
from softmod.config.schema import RunConfig
from softmod.spec import TaskScore, mean_success
from softmod.system import signals
from softmod.tracking.metrics import Log
from softmod.workers.pool import Workers

Result = TypeVar("Result")
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Updates:
    """What a run asks for in each round: so many updates of its agent on what its replay holds."""

    agent: Any
    replay: Replay
    number: int
    examine: bool
    env_steps: int  # of the run so far

    def make(self) -> Metrics:
        """Make them; the metrics of the last one."""
        metrics: Metrics = self.agent.learn(
            self.replay, self.number, signals.stopping, examine=self.examine
        )
        return metrics


Run = Generator[Updates, Metrics, Result]


def alone(run: Run[Result]) -> Result:
    """Let a run go to its end, and make the updates that it asks for."""
    try:
        updates = next(run)
        while True:
            try:
                metrics = updates.make()
            except (
                BaseException
            ) as error:  # it is the run's: its files and processes are closed by it
                updates = run.throw(error)
            else:
                updates = run.send(metrics)
    except StopIteration as end:
        result: Result = end.value
        return result


def train(
    run: RunConfig,
    clock: Clock,
    schedule: Schedule,
    agent: Any,
    workers: Workers,
    replay: Replay,
    log: Log,
    saver: Saver,
) -> Run[list[TaskScore]]:
    """Train until `run.steps_per_task`, `run.max_minutes` or `run.stop_at`; the scores of the last
    evaluation.

    Who lets the run go makes the updates that it asks for: by themselves (`alone`), or those of
    several runs at once.

    Where an evaluation ends the training, one more round comes before the last: no two evaluations
    at one step.

    Raises:
        StoppedError: a signal asked for it; what was begun and not finished is saved too.
    """
    total = run.steps_per_task * replay.spec.num_tasks
    evaluation = Evaluation(clock, agent, workers, replay, log, saver)
    clock.start()
    begun = saver.begun
    if begun.evaluation:
        evaluation.make(run.eval_goals, Begun(evaluation=True))

    while clock.env_steps < total and (
        not ended(run, clock) or (log.evaluated(clock) and not begun.over)
    ):
        signals.check()
        log.begin()

        # Collect: in the background, with these weights.
        policy = begun.policy or agent.policy()
        uniform = run.warmup_policy == "uniform" and schedule.warming_up(clock.env_steps)
        workers.start(policy, run.round_steps, uniform)

        # Learn: meanwhile, on what the replay held before.
        updates = schedule.updates(clock.env_steps)
        before = agent.updates - begun.updates
        logging = clock.will_pass(run.log_every, schedule.env_steps)
        metrics = yield Updates(agent, replay, updates - begun.updates, logging, clock.env_steps)

        if agent.updates - before < updates:  # told to stop: the round will be redone
            saver.stop(clock, log, workers.state(), Begun(policy, agent.updates - before))
        with log.waiting_for_workers():
            rollout = workers.finish()
        begun = Begun()
        replay.extend(rollout)
        agent.observe(rollout)
        clock.advance(rollout)

        # Log.
        log.round(clock, metrics, rollout, updates)
        if clock.passed(run.log_every) or clock.passed(run.save_every):
            log.write(clock)

        # Evaluate.
        if clock.passed(run.eval_every) and clock.env_steps < total and not ended(run, clock):
            evaluation.make(run.eval_goals, Begun(evaluation=True))

        # Save.
        if signals.stopping():
            saver.stop(clock, log, workers.state())
        if clock.passed(run.save_every):
            saver.try_save(clock, log, workers.state())

    log.write(clock)
    over = Begun(over=True)
    saver.save(
        clock, log, workers.state(), over
    )  # what is told at the end is of weights that are on the disk
    scores = evaluation.make(run.final_eval_goals, over)
    saver.save(clock, log, workers.state(), over)
    return scores


@dataclass
class Evaluation:
    """The parts that an evaluation needs."""

    clock: Clock
    agent: Any
    workers: Workers
    replay: Replay
    log: Log
    saver: Saver

    def make(self, goals: int, begun: Begun) -> list[TaskScore]:
        """Evaluate and tell; a run that is stopped meanwhile is saved as it was before, with what
        was `begun`.
        """
        try:
            scores = self.workers.evaluate(self.agent.policy(), goals)
        except signals.StoppedError:
            self.saver.stop(self.clock, self.log, self.workers.state(), begun)
        self.clock.evaluated(mean_success(scores))
        self.log.evaluation(self.clock, scores, self.agent.routes(self.replay))
        self.saver.keep_best(self.clock, scores)
        return scores


def ended(run: RunConfig, clock: Clock) -> bool:
    """Return whether `run.max_minutes` of training are over, or two evaluations running reached
    `run.stop_at`.
    """
    out_of_time = run.max_minutes is not None and clock.tick() >= 60.0 * run.max_minutes
    return out_of_time or clock.solved(run.stop_at)
