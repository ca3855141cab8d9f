"""Runs of the same experiment that differ in their seed, side by side in one process.

Each run has its own folder, journal, checkpoints and end. Only the updates that they yield are made
together (`softmod.agent.group`). A run that was saved at an earlier step than the others catches up
alone first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from softmod.agent.group import Group
from softmod.agent.mtsac import MTSAC
from softmod.experiment.loop import Result, Run
from softmod.experiment.session import Metrics, Updates
from softmod.system import signals


def side_by_side(
    runs: Mapping[int, Run[Result]], threads: int, failed: Callable[[int, Exception], None]
) -> dict[int, Result]:
    """Drive runs to their ends; return the results of the completed ones by seed.

    Args:
        runs: the runs by seed.
        threads: threads of the learner, for all runs together.
        failed: called with seed and error of each run that fails; the other runs continue.

    Raises:
        StoppedError: stopped by a signal; the runs have saved.
    """
    results: dict[int, Result] = {}
    pending: dict[int, Updates] = {}
    stopped: list[signals.StoppedError] = []

    def advance(seed: int, outcome: Metrics | BaseException | None) -> None:
        """Resume a run with the outcome of its updates, until it yields the next ones or ends."""
        pending.pop(seed, None)
        try:
            if isinstance(outcome, BaseException):
                pending[seed] = runs[seed].throw(outcome)
            else:
                pending[seed] = runs[seed].send(outcome)  # type: ignore[arg-type]
        except StopIteration as end:
            results[seed] = end.value
        except signals.StoppedError as stop:
            stopped.append(stop)
        except Exception as error:
            failed(seed, error)

    try:
        for seed in runs:
            advance(seed, None)
        groups = Groups(threads)
        while pending:
            due = groups.due(pending)
            updates = [pending[seed] for seed in due]
            try:
                outcomes: Sequence[Metrics | Exception] = groups.learn(updates)
            except Exception as error:
                outcomes = [error] * len(due)
            for seed, outcome in zip(due, outcomes, strict=True):
                advance(seed, outcome)
    except BaseException as error:  # Ctrl-C ends all of them at once
        for seed in pending:
            with suppress(BaseException):
                runs[seed].throw(error)
        raise
    if stopped:
        raise stopped[0]
    return results


class Groups:
    """The agents that learn together; the group is rebuilt when its members change.

    Args:
        threads: threads of the learner.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.group: tuple[list[int], Group] | None = None

    @staticmethod
    def due(pending: Mapping[int, Updates]) -> list[int]:
        """Return the seeds of the runs with the fewest env steps."""
        least = min(updates.env_steps for updates in pending.values())
        return [seed for seed, updates in pending.items() if updates.env_steps == least]

    def learn(self, pending: list[Updates]) -> list[Metrics]:
        """Make the pending updates, together where possible; return the metrics of each run."""
        agents = [updates.agent for updates in pending if isinstance(updates.agent, MTSAC)]
        own = any(type(agent).learn is not MTSAC.learn for agent in agents)
        if len(pending) == 1 or len(agents) < len(pending) or own:
            return [updates.make() for updates in pending]
        members = [id(agent) for agent in agents]
        if self.group is None or self.group[0] != members:
            self.group = members, Group(agents, self.threads)
        replays = [updates.replay for updates in pending]
        numbers = [updates.number for updates in pending]
        examine = any(updates.examine for updates in pending)
        return self.group[1].learn(replays, numbers, signals.stopping, examine)
