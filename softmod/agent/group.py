"""Agents of equal configuration, such as the seeds of an experiment, that learn in one process.

Each agent has its own weights, statistics and random numbers. Only the updates are batched over
agents (`softmod.capture.batched`). Up to rounding, results equal those of agents that learn alone.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from softmod.agent.mtsac import MTSAC, Metrics, UpdateInputs
from softmod.agent.replay import Replay
from softmod.capture.batched import Axis, FlagError, Stacks
from softmod.capture.cpu_graph import CpuGraph
from softmod.capture.recorder import NotRepeatableError, Operation, Recorder, address
from softmod.capture.update_graph import Captured, cuda_graph, state_of

# Methods of an agent, by the names of its programs.
FUNCTIONS = {"whole": "update", "critics": "update_critics"}

log = logging.getLogger(__name__)


class Group:
    """Agents that are updated side by side.

    Every thread has a part of equal size, whose updates are batched. The remaining agents are parts
    of one. Threads take turns with the parts, so that all of them are busy until the end.

    Args:
        agents: agents of equal configuration.
        threads: the number of threads; one on a GPU.
    """

    def __init__(self, agents: Sequence[MTSAC], threads: int = 1) -> None:
        self.threads = min(threads, len(agents)) if agents[0].device.type == "cpu" else 1
        size = len(agents) // self.threads
        batched = self.threads * size
        members = [list(range(start, start + size)) for start in range(0, batched, size)]
        members += [[number] for number in range(batched, len(agents))]
        self.parts = [Part(agents, part) for part in members]

    def learn(
        self,
        replays: Sequence[Replay],
        updates: Sequence[int],
        stop: Callable[[], bool] = lambda: False,
        examine: bool = False,
    ) -> list[Metrics]:
        """Make `updates[i]` updates of agent `i` on its own replay (see `MTSAC.learn`).

        Returns:
            The metrics of each agent's last update.
        """
        metrics: list[Metrics] = [{} for _ in replays]
        turns = Turns([part.learn(replays, updates, metrics, stop, examine) for part in self.parts])
        if self.threads == 1:
            turns.take()
            return metrics
        with ThreadPoolExecutor(self.threads) as threads:
            for done in [threads.submit(turns.take) for _ in range(self.threads)]:
                done.result()
        return metrics


class Turns:
    """Work in parts that yield what remains of them; threads advance them, the largest first."""

    def __init__(self, parts: Sequence[Iterator[int]]) -> None:
        self._waiting = [(math.inf, part) for part in parts]
        self._lock = threading.Lock()
        self._failed = False

    def take(self) -> None:
        """Advance parts until none waits; an error ends the work of all threads."""
        while turn := self._next():
            try:
                remaining = next(turn, None)
            except BaseException:
                self._failed = True
                raise
            if remaining is not None:
                with self._lock:
                    self._waiting.append((remaining, turn))

    def _next(self) -> Iterator[int] | None:
        with self._lock:
            if self._failed or not self._waiting:
                return None
            most = max(self._waiting, key=lambda waiting: waiting[0])
            self._waiting.remove(most)
            return most[1]


class Part:
    """Agents whose updates are batched.

    Agents with the same number of remaining updates are updated together.

    Args:
        agents: all agents of the group.
        members: the numbers of the part's own agents.
    """

    def __init__(self, agents: Sequence[MTSAC], members: Sequence[int]) -> None:
        self.members = members
        self.agents = [agents[number] for number in members]
        self.stacks = Stacks(len(members))
        self.programs: dict[str, BatchedProgram] = {}
        self.loaded = False  # True while the stacks, not the agents, hold the current state

    def learn(
        self,
        replays: Sequence[Replay],
        updates: Sequence[int],
        metrics: list[Metrics],
        stop: Callable[[], bool],
        examine: bool,
    ) -> Iterator[int]:
        """Make the own agents' updates of a round, of which all are given (see `Group.learn`).

        Yields:
            The updates that remain, of all own agents, after each update.
        """
        remaining = [updates[number] for number in self.members]
        own = [replays[number] for number in self.members]
        while most := max(remaining):
            due = [i for i, number in enumerate(remaining) if number == most]
            first = self.agents[due[0]]
            if first.updates % first.policy_delay == 0 and stop():
                break
            for i, latest in zip(due, self._update(due, own, most), strict=True):
                metrics[self.members[i]] |= self.agents[i].count_update(latest)
                remaining[i] -= 1
            yield sum(remaining)
        self.unload()
        if not any(remaining):
            for agent, number in zip(self.agents, self.members, strict=True):
                if updates[number]:
                    metrics[number] |= agent.insight(examine)

    def _update(
        self, due: Sequence[int], replays: Sequence[Replay], remaining: int
    ) -> list[Metrics]:
        """Make one of `remaining` updates of the agents `due`.

        The update is batched if all agents are due and run the same program.
        """
        agents = [self.agents[i] for i in due]
        programs = [agent.program(agent.updates) for agent in agents]
        inputs: list[UpdateInputs] = []
        for i in due:
            inputs.append(self.agents[i].next_inputs(replays[i], remaining))
        if len(due) == len(self.agents) > 1 and len(set(programs)) == 1:
            name = programs[0]
            if name not in self.programs:
                self.programs[name] = BatchedProgram(self, name)
            return self.programs[name](inputs)
        self.unload()
        return [
            agent.programs[name](*own)
            for agent, name, own in zip(agents, programs, inputs, strict=True)
        ]

    def load(self) -> None:
        """Update the stacks from the agents; include the state if the stacks do not hold it."""
        self.stacks.load(state=not self.loaded)
        self.loaded = True

    def unload(self) -> None:
        """Copy the state from the stacks to the agents' own memory."""
        if self.loaded:
            self.stacks.store()
        self.loaded = False


class BatchedProgram:
    """A program of several agents, run for all of them at once, or one by one if it cannot be.

    The first call records the program for each agent. State changes of the recording are undone.
    """

    def __init__(self, part: Part, name: str) -> None:
        self.part = part
        self.name = name
        self.functions = [getattr(agent, FUNCTIONS[name]) for agent in part.agents]
        captured = all(isinstance(agent.programs[name], Captured) for agent in part.agents)
        self._next = self._record if captured else self._one_by_one

    def __call__(self, inputs: list[UpdateInputs]) -> list[Metrics]:
        """Make one update of every agent; return the metrics of each."""
        return self._next(inputs)

    def _one_by_one(self, inputs: list[UpdateInputs]) -> list[Metrics]:
        self.part.unload()
        return [
            agent.programs[self.name](*own)
            for agent, own in zip(self.part.agents, inputs, strict=True)
        ]

    def _record(self, inputs: list[UpdateInputs]) -> list[Metrics]:
        self.part.unload()
        recordings: list[list[Operation]] = []
        metrics: list[Metrics] = []
        for number, own in enumerate(inputs):
            operations, recorded_metrics = self._record_agent(number, own)
            recordings.append(operations)
            metrics.append(recorded_metrics)
        if any(operation.value is False for recording in recordings for operation in recording):
            return self._one_by_one(inputs)  # a flag was False, so the recording is incomplete
        try:
            self.part.stacks.add(recordings)
            self._prepare(recordings[0], inputs[0], metrics[0])
        except NotRepeatableError as error:
            self._fall_back(error)
            self.part.loaded = False  # the agents' own memory is unchanged
        return self._next(inputs)

    def _record_agent(self, number: int, inputs: UpdateInputs) -> tuple[list[Operation], Metrics]:
        """Record an update of one agent, then undo its changes.

        Returns:
            The operations, and the metrics as tensors that the operations write.
        """
        live = state_of(self.part.agents[number])
        before = [tensor.clone() for tensor in live]
        self.functions[number](*inputs)  # allocates memory that later calls reuse
        with Recorder() as recorder:
            metrics = self.functions[number](*inputs)
        with torch.no_grad():
            torch._foreach_copy_(live, before)
        return recorder.operations, metrics

    def _prepare(self, operations: list[Operation], inputs: UpdateInputs, metrics: Metrics) -> None:
        self.axis = Axis(operations, self.part.stacks)
        self.wanted = metrics
        batch, *noise = inputs
        self.stacked_inputs = [self._stacked_input(tensor) for tensor in (*batch, *noise)]
        self.live: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.saved: Tensor | None = None
        first = self.part.agents[0]
        if self.name in first.rollback_programs and first.rollback is not None:
            self.live = [self.axis.of(tensor) for tensor in first.rollback.live]
            self.copies = [self.axis.of(tensor) for tensor in first.rollback.copies]
            self.saved = self.axis.of(first.rollback.saved)
        undone = [*self.live, *self.copies, *([] if self.saved is None else [self.saved])]
        self.graph = CpuGraph(self._run_batched, self._undo, undone)
        self.repeat: Callable[[], Metrics] = self.graph
        if first.device.type == "cuda":
            self.part.load()
            everything = [stack.all for stack in self.part.stacks.of.values()]
            self.repeat = cuda_graph(lambda: self.axis.run(self.wanted), everything)
        self._next = self._repeat

    def _stacked_input(self, tensor: Tensor) -> Tensor | None:
        """Return the stack that receives a recorded input; None if the program does not read it."""
        if address(tensor) not in self.part.stacks.of:
            return None
        self.part.stacks.inputs.add(address(tensor))
        return self.axis.of(tensor)

    def _repeat(self, inputs: list[UpdateInputs]) -> list[Metrics]:
        self.inputs = inputs
        if not self.settled:  # this call may still fall back, which needs the agents' own state
            self.part.unload()
        self.part.load()
        for i, (batch, *noise) in enumerate(inputs):
            for stacked, tensor in zip(self.stacked_inputs, (*batch, *noise), strict=True):
                if stacked is not None:
                    stacked[i].copy_(tensor)
        try:
            metrics = self.repeat()
        except NotRepeatableError as error:  # only possible in the first call
            self._fall_back(error)
            self.part.loaded = False  # the agents' own memory is unchanged
            return self._next(inputs)
        return [{name: tensor[i] for name, tensor in metrics.items()} for i in range(len(inputs))]

    @property
    def settled(self) -> bool:
        """Return whether all further calls repeat the recorded operations."""
        return self.repeat is not self.graph or self.graph.settled

    def _run_batched(self) -> Metrics:
        try:
            return self.axis.run(self.wanted)
        except FlagError:
            self._undo()
            return self._run_separately()

    def _undo(self) -> None:
        if self.saved is not None and self.saved.all():
            torch._foreach_copy_(self.live, self.copies)

    def _run_separately(self) -> Metrics:
        """Make the update of each agent alone, since the update of one of them is not finite."""
        self.part.stacks.store()
        metrics = [
            function(*own) for function, own in zip(self.functions, self.inputs, strict=True)
        ]
        self.part.stacks.load(state=True)
        return {name: torch.stack([own[name] for own in metrics]) for name in metrics[0]}

    def _fall_back(self, error: NotRepeatableError) -> None:
        log.info(
            "updates of %s agents are made one after another: %s", len(self.part.agents), error
        )
        self._next = self._one_by_one
