"""Runs of the same experiment that differ in their seed, side by side in one process.

Each is a run as any other, with its own folder, journal, checkpoints and end; only the updates that
they ask for are made together (`softmod.agent.group`). One that is behind, since it was saved
earlier, catches up by itself first.
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
    """Let runs go to their ends; the results of those that came to it, by their seeds.

    Args:
        runs: by their seeds.
        threads: that updates are made in.
        failed: is given a run's seed and error; the others go on.

    Raises:
        StoppedError: a signal asked for it, and the runs have saved.
    """
    results: dict[int, Result] = {}
    asked: dict[int, Updates] = {}
    stopped: list[signals.StoppedError] = []

    def go_on(seed: int, answer: Metrics | BaseException | None) -> None:
        """Let a run go on until it asks again, or ends."""
        asked.pop(seed, None)
        try:
            if isinstance(answer, BaseException):
                asked[seed] = runs[seed].throw(answer)
            else:
                asked[seed] = runs[seed].send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            results[seed] = end.value
        except signals.StoppedError as stop:
            stopped.append(stop)
        except Exception as error:
            failed(seed, error)

    try:
        for seed in runs:
            go_on(seed, None)
        groups = Groups(threads)
        while asked:
            due = groups.due(asked)
            try:
                answers: Sequence[Metrics | Exception] = groups.learn([asked[seed] for seed in due])
            except Exception as error:
                answers = [error for _ in due]
            for seed, answer in zip(due, answers, strict=True):
                go_on(seed, answer)
    except BaseException as error:  # Ctrl-C ends all of them at once
        for seed in asked:
            with suppress(BaseException):
                runs[seed].throw(error)
        raise
    if stopped:
        raise stopped[0]
    return results


class Groups:
    """The group of agents that learned last; another one is made when others are due."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.group: tuple[list[int], Group] | None = None

    @staticmethod
    def due(asked: Mapping[int, Updates]) -> list[int]:
        """The seeds of those runs that are the furthest behind."""
        least = min(updates.env_steps for updates in asked.values())
        return [seed for seed, updates in asked.items() if updates.env_steps == least]

    def learn(self, asked: list[Updates]) -> list[Metrics]:
        """Make the updates that runs ask for."""
        agents = [updates.agent for updates in asked if isinstance(updates.agent, MTSAC)]
        own = any(type(agent).learn is not MTSAC.learn for agent in agents)
        if len(asked) == 1 or len(agents) < len(asked) or own:
            return [updates.make() for updates in asked]
        members = [id(agent) for agent in agents]
        if self.group is None or self.group[0] != members:
            self.group = members, Group(agents, self.threads)
        numbers = [updates.number for updates in asked]
        examine = any(updates.examine for updates in asked)
        return self.group[1].learn(
            [updates.replay for updates in asked], numbers, signals.stopping, examine
        )
