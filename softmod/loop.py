"""The loop: the one place where the parts meet."""

from __future__ import annotations

from typing import Any

from softmod import signals
from softmod.clock import Clock, Schedule
from softmod.log import Log
from softmod.replay import Replay
from softmod.saver import Saver
from softmod.schema import RunConfig
from softmod.types import TaskScore
from softmod.workers.pool import Workers


def train(
    run: RunConfig,
    clock: Clock,
    schedule: Schedule,
    agent: Any,
    workers: Workers,
    replay: Replay,
    log: Log,
    saver: Saver,
) -> list[TaskScore]:
    """Train until `run.steps_per_task` or `run.max_minutes`; the scores of the last evaluation."""
    total = run.steps_per_task * replay.spec.num_tasks
    clock.start()

    while clock.env_steps < total and not out_of_time(run, clock):
        signals.check()
        log.begin()

        # Collect: in the background, with these weights.
        workers.start(agent.policy(), run.round_steps)

        # Learn: meanwhile, on what the replay held before.
        updates = schedule.updates(clock.env_steps)
        metrics = agent.learn(replay, updates)

        with log.waiting_for_workers():
            rollout = workers.finish()
        replay.extend(rollout)
        clock.advance(rollout)

        # Log.
        log.round(clock, metrics, rollout, updates)
        if clock.passed(run.log_every) or clock.passed(run.save_every):
            log.write(clock)

        # Evaluate.
        if clock.passed(run.eval_every) and clock.env_steps < total:
            scores = workers.evaluate(agent.policy(), run.eval_goals)
            log.evaluation(clock, scores)
            saver.keep_best(clock, scores)

        # Save.
        if clock.passed(run.save_every):
            saver.save(clock)

    scores = workers.evaluate(agent.policy(), run.final_eval_goals)
    log.write(clock)
    log.evaluation(clock, scores)
    saver.keep_best(clock, scores)
    saver.save(clock)
    return scores


def out_of_time(run: RunConfig, clock: Clock) -> bool:
    """Whether `run.max_minutes` of training are over."""
    return run.max_minutes is not None and clock.tick() >= 60.0 * run.max_minutes
