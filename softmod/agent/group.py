"""Agents of equal configuration, such as the seeds of an experiment, that learn side by side in one
process.

Each of them stays an agent of its own, with its own weights, statistics and random numbers. Only
their updates are made together (`softmod.capture.batched`), each equal to what the agent would have
made by itself, up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from softmod.agent.mtsac import MTSAC, Given, Metrics
from softmod.agent.replay import Replay
from softmod.capture.batched import Axis, FlagError, Stacks
from softmod.capture.cpu_graph import CpuGraph
from softmod.capture.recorder import NotRepeatableError, Operation, Recorder, place
from softmod.capture.update_graph import Captured, cuda_graph, state_of

# Methods of an agent, by the names of its programs.
FUNCTIONS = {"whole": "update", "critics": "update_critics"}

log = logging.getLogger(__name__)


class Group:
    """Makes the updates of several agents: in as many threads as asked for, in each those of some
    agents at once.

    Args:
        agents: of equal configuration.
        threads: how many are used; on a GPU one.
    """

    def __init__(self, agents: Sequence[MTSAC], threads: int = 1) -> None:
        parts = min(threads, len(agents)) if agents[0].device.type == "cpu" else 1
        self.parts = [Part(agents[part::parts]) for part in range(parts)]

    def learn(
        self,
        replays: Sequence[Replay],
        updates: Sequence[int],
        stop: Callable[[], bool] = lambda: False,
        examine: bool = False,
    ) -> list[Metrics]:
        """Make so many updates of each agent on its own replay; the metrics of each one's last (see
        `MTSAC.learn`).
        """
        many = len(self.parts)
        metrics: list[Metrics] = [{} for _ in replays]

        def learn(number: int) -> None:
            own = slice(number, None, many)
            metrics[own] = self.parts[number].learn(replays[own], updates[own], stop, examine)

        if many == 1:
            learn(0)
            return metrics
        with ThreadPoolExecutor(many) as threads:
            list(threads.map(learn, range(many)))
        return metrics


class Part:
    """Agents whose updates are made at once, as far as they have the same number of updates to
    make.
    """

    def __init__(self, agents: Sequence[MTSAC]) -> None:
        self.agents = agents
        self.stacks = Stacks(len(agents))
        self.programs: dict[str, Together] = {}
        self.loaded = False  # whether the agents' state is in the stacks, not in their own memory

    def learn(
        self,
        replays: Sequence[Replay],
        updates: Sequence[int],
        stop: Callable[[], bool],
        examine: bool,
    ) -> list[Metrics]:
        metrics: list[Metrics] = [{} for _ in self.agents]
        left = list(updates)
        while most := max(left):
            due = [i for i, number in enumerate(left) if number == most]
            first = self.agents[due[0]]
            if first.updates % first.policy_delay == 0 and stop():
                break
            for i, made in zip(due, self._update(due, replays), strict=True):
                metrics[i] |= self.agents[i].made(made)
                left[i] -= 1
        self.unload()
        if not any(left):
            for agent, number, told in zip(self.agents, updates, metrics, strict=True):
                told |= agent.insight(examine) if number else {}
        return metrics

    def _update(self, due: Sequence[int], replays: Sequence[Replay]) -> list[Metrics]:
        """Make an update of those agents that are due: at once if all of them are, and
        do the same.
        """
        agents = [self.agents[i] for i in due]
        programs = [agent.program(agent.updates) for agent in agents]
        given = [
            agent.prepare(agent.sample(replays[i])) for agent, i in zip(agents, due, strict=True)
        ]
        if len(due) == len(self.agents) > 1 and len(set(programs)) == 1:
            name = programs[0]
            if name not in self.programs:
                self.programs[name] = Together(self, name)
            return self.programs[name](given)
        self.unload()
        return [
            agent.programs[name](*own)
            for agent, name, own in zip(agents, programs, given, strict=True)
        ]

    def load(self) -> None:
        """Bring the stacks up to date with the agents; with their state, if it is not there yet."""
        self.stacks.load(state=not self.loaded)
        self.loaded = True

    def unload(self) -> None:
        """Bring the agents' state back to their own memory."""
        if self.loaded:
            self.stacks.store()
        self.loaded = False


class Together:
    """One of the agents' programs, made for all of them at once; for one after another where that
    cannot be.

    It is recorded for each agent first, with changes that are taken back.
    """

    def __init__(self, part: Part, name: str) -> None:
        self.part = part
        self.name = name
        self.functions = [getattr(agent, FUNCTIONS[name]) for agent in part.agents]
        captured = all(isinstance(agent.programs[name], Captured) for agent in part.agents)
        self._next = self._first if captured else self._one_by_one

    def __call__(self, given: list[Given]) -> list[Metrics]:
        return self._next(given)

    def _one_by_one(self, given: list[Given]) -> list[Metrics]:
        self.part.unload()
        return [
            agent.programs[self.name](*own)
            for agent, own in zip(self.part.agents, given, strict=True)
        ]

    def _first(self, given: list[Given]) -> list[Metrics]:
        self.part.unload()
        made = [self._recorded(i, own) for i, own in enumerate(given)]
        recordings = [operations for operations, _ in made]
        if any(operation.value is False for recording in recordings for operation in recording):
            return self._one_by_one(given)  # a flag was not set, so not everything was recorded
        try:
            self.part.stacks.add(recordings)
            self._prepare(recordings[0], given[0], made[0][1])
        except NotRepeatableError as error:
            self._give_up(error)
        return self._next(given)

    def _recorded(self, number: int, given: Given) -> tuple[list[Operation], Metrics]:
        """The operations of an agent's update, and where its metrics lie; what it changes is taken
        back.
        """
        live = state_of(self.part.agents[number])
        before = [tensor.clone() for tensor in live]
        self.functions[number](*given)  # memory comes to be that is kept
        with Recorder() as recorder:
            metrics = self.functions[number](*given)
        with torch.no_grad():
            torch._foreach_copy_(live, before)
        return recorder.operations, metrics

    def _prepare(self, operations: list[Operation], given: Given, metrics: Metrics) -> None:
        self.axis = Axis(operations, self.part.stacks)
        self.wanted = metrics
        batch, *noise = given
        self.inputs = [self._input(tensor) for tensor in (*batch, *noise)]
        rollback = self.part.agents[0].rollback
        undoes = self.name in self.part.agents[0].undoing and rollback is not None
        self.live = (
            [self.axis.of(tensor) for tensor in rollback.live] if undoes and rollback else []
        )
        self.copies = (
            [self.axis.of(tensor) for tensor in rollback.copies] if undoes and rollback else []
        )
        self.graph = CpuGraph(self._at_once, self._undo, [*self.live, *self.copies])
        self.repeat: Callable[[], Metrics] = self.graph
        device = self.part.agents[0].device
        if device.type == "cuda":
            self.part.load()
            everything = [stack.all for stack in self.part.stacks.of.values()]
            self.repeat = cuda_graph(lambda: self.axis.run(self.wanted), everything)
        self._next = self._repeat

    def _input(self, tensor: Tensor) -> Tensor | None:
        """Return the stack of an input that was recorded, to be filled; None if the program does
        not read it.
        """
        if place(tensor) not in self.part.stacks.of:
            return None
        self.part.stacks.inputs.add(place(tensor))
        return self.axis.of(tensor)

    def _repeat(self, given: list[Given]) -> list[Metrics]:
        self.given = given
        if not self.settled:  # it may turn out that they cannot be made at once
            self.part.unload()
        self.part.load()
        for i, (batch, *noise) in enumerate(given):
            for stacked, tensor in zip(self.inputs, (*batch, *noise), strict=True):
                if stacked is not None:
                    stacked[i].copy_(tensor)
        try:
            metrics = self.repeat()
        except NotRepeatableError as error:  # at the first call, if at any
            self._give_up(error)
            self.part.loaded = False  # the agents' own memory is as it was before
            return self._next(given)
        return [{name: tensor[i] for name, tensor in metrics.items()} for i in range(len(given))]

    @property
    def settled(self) -> bool:
        """Return whether the operations are only repeated from now on."""
        return self.repeat is not self.graph or self.graph.settled

    def _at_once(self) -> Metrics:
        try:
            return self.axis.run(self.wanted)
        except FlagError:
            self._undo()
            return self._apart()

    def _undo(self) -> None:
        if self.live:
            torch._foreach_copy_(self.live, self.copies)

    def _apart(self) -> Metrics:
        """Make the update of each agent by itself; one of them is not finite, which the others do
        not notice.
        """
        self.part.stacks.store()
        metrics = [function(*own) for function, own in zip(self.functions, self.given, strict=True)]
        self.part.stacks.load(state=True)
        return {name: torch.stack([own[name] for own in metrics]) for name in metrics[0]}

    def _give_up(self, error: NotRepeatableError) -> None:
        log.info(
            "updates of %s agents are made one after another: %s", len(self.part.agents), error
        )
        self._next = self._one_by_one
