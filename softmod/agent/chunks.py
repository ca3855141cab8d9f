"""Updates several at a time, with all random numbers drawn on the device; on a GPU as one graph.

Random numbers are functions of the seed and the update's number (`softmod.counter`), so results do
not depend on how updates are divided into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from softmod.agent.replay import Batch, Replay
from softmod.capture.compiled import Compiled
from softmod.capture.update_graph import Captured, Update, cuda_graph, state_of
from softmod.counter import Counter, normal_table, normals
from softmod.seeding import counter_key

if TYPE_CHECKING:
    from softmod.agent.mtsac import MTSAC, Metrics, UpdateInputs

GRAPHS = 4  # recorded graphs; a run needs two, or four if rounds split policy delays


class Draws(NamedTuple):
    """The random inputs of several updates, in order."""

    fields: list[Tensor]  # of the batches and the noise, `[update, ...]`
    inside: Int[Tensor, "update word"]  # random words for `MTSAC.draw_from`


class Chunks:
    """Makes updates of an agent in chunks of up to `size`.

    A chunk ends before a policy update, or with its round. On a GPU, if the agent's programs are
    captured, a chunk is recorded as one CUDA graph per length and position within a policy delay. A
    graph is recorded anew if the replay has new tables.

    Every update reads its inputs from the same memory, so its results do not depend on its place in
    the chunk, and the inputs of the last update stay available.

    Args:
        agent: the agent, on its device.
        size: updates per chunk; a multiple of the policy delay.
    """

    def __init__(self, agent: MTSAC, size: int) -> None:
        self.agent = agent
        self.size = size
        device = agent.device
        programs = agent.programs
        captured = all(isinstance(program, Captured) for program in programs.values())
        self.as_graph = captured and device.type == "cuda"
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # of the chunk's first
        self.skipped = torch.zeros((), device=device)  # consecutive non-finite updates
        self.counter = Counter(counter_key(agent.seed), device)
        self.table = normal_table(device)
        rows = (agent.spec.num_tasks, agent.batch_per_task)
        action = (*rows, agent.spec.action_dim)
        obs = (*rows, agent.spec.obs_dim)
        shapes = (obs, action, rows, obs, rows, (2, *action))  # of a batch's fields and the noise
        self.inputs = [torch.zeros(shape, device=device) for shape in shapes]
        self.recorded: dict[tuple[int, int], Callable[[], Metrics]] = {}
        self.tables: tuple[Tensor, ...] = ()  # of the replay, in the recorded graphs
        self.ahead: tuple[tuple[Replay, int, int], Draws] | None = None

    def learn(self, replay: Replay, remaining: int) -> tuple[Metrics, int]:
        """Make the next chunk of a round.

        Args:
            replay: the transitions to sample.
            remaining: updates that remain in the round.

        Returns:
            The metrics of the last update, and the number of updates made.
        """
        agent = self.agent
        phase, length = self.next_chunk(remaining)
        self._begin(replay)
        if self.as_graph:
            metrics = self._graph(replay, phase, length)()
        else:
            metrics = self._make(replay, phase, length, agent.programs)
        agent.updates += length
        agent.skipped = self.skipped
        agent.given = self.given
        return metrics, length

    def next_chunk(self, remaining: int) -> tuple[int, int]:
        """Return the updates since the last policy update, and the length of the next chunk."""
        phase = self.agent.updates % self.agent.policy_delay
        until_policy = -phase % self.agent.policy_delay
        return phase, min(remaining, until_policy + self.size)

    @property
    def given(self) -> UpdateInputs:
        """Return the memory that updates read their inputs from."""
        *batch, noise = self.inputs
        return Batch(*batch), noise[0], noise[1]

    def next_inputs(self, replay: Replay, remaining: int) -> UpdateInputs:
        """Return the inputs of the next update, for updates that others make one at a time.

        Inputs are drawn for a chunk and kept while the replay stays the same.
        """
        number = self.agent.updates
        if self.ahead is not None:
            (of, written, first), draws = self.ahead
            at = number - first
            if of is replay and written == replay.written and 0 <= at < len(draws.inside):
                return self._provide(draws, at)
        self._begin(replay)
        _, length = self.next_chunk(remaining)
        draws = self._draw(replay, length)
        self.ahead = (replay, replay.written, number), draws
        return self._provide(draws, 0)

    def inside(self) -> Int[Tensor, " word"]:
        """Return the random words for `MTSAC.draw_from` in the next update."""
        self.number.fill_(self.agent.updates)
        return self._words(1)[2][0]

    def _begin(self, replay: Replay) -> None:
        """Set the tensors that a chunk starts from.

        Raises:
            ValueError: the replay is empty.
        """
        if not replay.size:
            raise ValueError("cannot sample from an empty replay")
        self.number.fill_(self.agent.updates)
        if self.agent.skipped is None:
            self.skipped.zero_()
        elif self.agent.skipped is not self.skipped:
            self.skipped.copy_(self.agent.skipped)

    def _graph(self, replay: Replay, phase: int, length: int) -> Callable[[], Metrics]:
        """Return the recorded chunk; record it if it is new or the replay has new tables."""
        tables = (replay.rows, replay.episodes)
        if len(self.tables) != len(tables) or any(
            mine is not its for mine, its in zip(self.tables, tables, strict=True)
        ):
            self.recorded.clear()
            self.tables = tables
        key = (phase, length)
        if key not in self.recorded:
            if len(self.recorded) == GRAPHS:
                self.recorded.pop(next(iter(self.recorded)))
            programs = {
                name: program.program if isinstance(program, Captured) else program
                for name, program in self.agent.programs.items()
            }
            self.recorded[key] = cuda_graph(
                lambda: self._make(replay, phase, length, programs),
                [*state_of(self.agent), self.skipped],
            )
        return self.recorded[key]

    def _make(
        self, replay: Replay, phase: int, length: int, programs: dict[str, Update]
    ) -> Metrics:
        """Make the updates of a chunk; all that changes between two calls is on the device."""
        agent = self.agent
        draws = self._draw(replay, length)
        metrics: Metrics = {}
        recorded = any(isinstance(own, Captured | Compiled) for own in programs.values())
        for at in range(length):
            batch, noise, next_noise = self._provide(draws, at)
            # Earlier updates need no metrics, but a recorded program returns the same ones always.
            agent.measures = recorded or at >= length - agent.policy_delay
            try:
                latest = programs[agent.program(phase + at)](batch, noise, next_noise)
            finally:
                agent.measures = True
            self.skipped.add_(1.0).masked_fill_(latest["finite"], 0.0)
            # Merged, because critic-only updates have no metrics of the policy.
            metrics |= latest
        return metrics | {"skipped_in_a_row": self.skipped.clone()}

    def _provide(self, draws: Draws, at: int) -> UpdateInputs:
        """Copy the inputs of one update to the memory that updates read."""
        torch._foreach_copy_(self.inputs, [field[at] for field in draws.fields])
        self.agent.draw_from(draws.inside[at])
        return self.given

    def _draw(self, replay: Replay, length: int) -> Draws:
        """Draw the inputs of the updates from `number` on."""
        agent = self.agent
        transitions, noise, inside = self._words(length)
        batch = replay.sample_at(transitions, agent.n_step, agent.discount)
        # Contiguous, so that the fields of an update are copied in one launch.
        fields = [field.contiguous() for field in batch]
        return Draws([*fields, normals(noise, self.table)], inside)

    def _words(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the random words of the updates from `number` on.

        They choose transitions `[update, task, batch]`, noise `[update, 2, task, batch, action]`
        and what is random inside networks `[update, word]`.
        """
        agent = self.agent
        transitions = self.inputs[2].shape
        noise = self.inputs[-1].shape
        sizes = [transitions.numel(), noise.numel(), agent.random_words()]
        numbers = self.number + torch.arange(length, device=self.number.device)
        words = self.counter.words(numbers, sum(sizes)).split(sizes, 1)
        return words[0].unflatten(1, transitions), words[1].unflatten(1, noise), words[2]
