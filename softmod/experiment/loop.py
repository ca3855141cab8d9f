"""The training loop: collect, learn, log, evaluate, save."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from softmod.config.schema import RunConfig
from softmod.experiment.session import Metrics, Parts, Session, Updates
from softmod.spec import TaskScore
from softmod.system import signals

Result = TypeVar("Result")
Run = Generator[Updates, Metrics, Result]


def train(run: RunConfig, parts: Parts) -> Run[list[TaskScore]]:
    """Train until `run.steps_per_task`, `run.max_minutes` or `run.stop_at`.

    Yields the updates that are due; the caller makes them and sends back the metrics. `alone` does
    this for one run, `softmod.experiment.seeds` for several together.

    Returns:
        The scores of the last evaluation.

    Raises:
        StoppedError: stopped by a signal, after saving, with pending work.
    """
    agent = parts.agent
    replay = parts.replay
    workers = parts.workers
    clock = parts.clock
    log = parts.log
    session = Session(run, parts)
    clock.start()
    session.evaluate_what_is_pending()
    while session.goes_on():
        signals.check()
        log.begin()

        # Collect with these weights, in the background unless the learner needs the workers' cores.
        policy = session.policy()
        workers.start(policy, run.round_steps, session.uniform())
        if parts.in_turns:
            session.wait_for_workers(policy)

        # Learn from the replay as it was before this round.
        metrics = yield session.updates()
        session.stop_within_round(policy)

        with log.waiting_for_workers():
            rollout = workers.finish()
        replay.extend(rollout)
        agent.observe(rollout)
        clock.advance(rollout)

        session.log(metrics, rollout)
        session.evaluate()
        session.save()
    return session.end()


def alone(run: Run[Result]) -> Result:
    """Drive a run to its end, making the updates that it yields; return its result."""
    try:
        updates = next(run)
        while True:
            try:
                metrics = updates.make()
            except BaseException as error:  # raised within the run, which closes its resources
                updates = run.throw(error)
            else:
                updates = run.send(metrics)
    except StopIteration as end:
        result: Result = end.value
        return result
