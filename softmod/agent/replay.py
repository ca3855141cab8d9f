"""The replay buffer on the learner's device. It stores every state once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from softmod.counter import integers
from softmod.errors import WorkerError
from softmod.spec import EnvSpec, Floats, Rollout

Numbers = NDArray[np.int64]


class Batch(NamedTuple):
    """Transitions over one or several steps, with a task axis.

    `reward` is the discounted sum of rewards over the steps of a transition. `discount` is the
    factor of the value of `next_obs`. Every transition bootstraps, since episodes end only at their
    time limit (9).
    """

    obs: Float[Tensor, "task batch obs"]
    action: Float[Tensor, "task batch action"]
    reward: Float[Tensor, "task batch"]
    next_obs: Float[Tensor, "task batch obs"]
    discount: Float[Tensor, "task batch"]


class Piece(NamedTuple):
    """Rows of a replay and the entries of their episodes, on the CPU.

    The entries of task `i` start at episode number `first_episode[i]`. Entries without rows are
    zero.
    """

    rows: Float[Tensor, "task count width"]
    first_episode: Int[Tensor, " task"]
    episodes: Float[Tensor, "task episode obs"]


class Replay:
    """The last `capacity` transitions of each task.

    Batches are drawn with replacement, independently per task (10). They are bitwise equal to those
    of a replay that stores two whole observations per transition.

    A transition is a row: state, action, reward, and its episode's number within the task. The
    previous and the next state are read from the neighbouring rows of the episode. A table has an
    entry per episode for what rows do not hold: the other parts of the first observation, and the
    state after the latest transition.

    Transitions are stored step by step, and within a step copy by copy, so the next row of an
    episode is `copies` rows further. Rows and episodes are numbered per task from the start of the
    run. Row `n` is at index `n` modulo the ring size, entry `n` at `n` modulo the number of slots.
    Rows hold episode numbers as floats, exact up to 2^24.

    Args:
        spec: the number of tasks, and the parts of an observation.
        capacity: transitions kept per task.
        device: the device of rows and batches.
        copies: environments per task.
    """

    def __init__(
        self, spec: EnvSpec, capacity: int, device: torch.device | str = "cpu", copies: int = 1
    ) -> None:
        self.spec = spec
        self.capacity = capacity
        self.copies = copies
        self.widths = (spec.state_dim, spec.action_dim, 1, 1)
        self.ring = capacity + copies  # the oldest transitions need the rows before them
        self.rows = torch.empty(spec.num_tasks, self.ring, sum(self.widths), device=device)
        slots = 2 * (self.ring // spec.episode_steps + copies + 1)
        self.episodes = torch.empty(spec.num_tasks, slots, spec.obs_dim, device=device)
        self.end = torch.zeros((), dtype=torch.int64, device=device)  # `written`, for graphs
        self.written = 0  # transitions written per task; modulo the ring size, the write index
        # The episode number of each environment.
        self.running: Numbers = np.full((spec.num_tasks, copies), -1)
        # A lower bound of the episode numbers in rows.
        self._oldest: Numbers = np.zeros(spec.num_tasks, np.int64)

    @property
    def device(self) -> torch.device:
        """Return the device of rows and batches."""
        return self.rows.device

    @property
    def written(self) -> int:
        """Return the number of transitions written per task."""
        return self._written

    @written.setter
    def written(self, number: int) -> None:
        self._written = number
        self.end.fill_(number)

    @property
    def size(self) -> int:
        """Return the number of transitions per task that can be drawn."""
        return min(self.written, self.capacity)

    @property
    def first_row(self) -> int:
        """Return the number of the oldest stored row, counted from the start of the run."""
        return max(0, self.written - self.ring)

    # --- writing ----------------------------------------------------------------------------------

    def extend(self, rollout: Rollout) -> None:
        """Append a round `[task, copy, step, ...]`, overwriting the oldest rows.

        Raises:
            WorkerError: observations are not composed as the `EnvSpec` declares (see `check`).
        """
        check(rollout, self.spec)
        state = self.spec.state_dim
        begins = rollout.begins.copy()
        begins[:, :, 0] |= self.running < 0
        numbers = self._number(begins)
        parts = (
            rollout.obs[..., :state],
            rollout.action,
            rollout.reward[..., None],
            numbers[..., None],
        )
        whole = np.concatenate(parts, -1, dtype=np.float32)
        by_step = whole.swapaxes(1, 2)  # (task, step, copy, width)
        self._append(torch.from_numpy(by_step.reshape(self.spec.num_tasks, -1, sum(self.widths))))
        self._make_room()
        at_begin = np.nonzero(begins)[0], numbers[begins]
        self._enter(*at_begin, rollout.obs[..., state:][begins], slice(state, None))
        last = np.roll(begins, -1, 2)
        last[:, :, -1] = True
        at_end = np.nonzero(last)[0], numbers[last]
        # The next round overwrites the state of episodes that continue.
        self._enter(*at_end, rollout.next_obs[..., :state][last], slice(state))

    def restore(self, first: int, pieces: Iterable[Piece]) -> None:
        """Fill an empty replay from the row number `first` on, with pieces from `since`."""
        self.written = first
        entries: list[tuple[int, Tensor, Tensor]] = []
        for piece in pieces:
            self._append(piece.rows)
            for task in range(self.spec.num_tasks):
                numbers = piece.rows[task, :, -1].unique().long()
                entries.append(
                    (task, numbers, piece.episodes[task, numbers - piece.first_episode[task]])
                )
        if not self.written:
            return
        newest = torch.arange(self.written - self.copies, self.written) % self.ring
        self.running = self.rows[:, newest, -1].cpu().numpy().astype(np.int64)
        self._oldest = self._lowest()  # valid only after all rows are appended
        self._make_room()
        for task, numbers, values in entries:  # later pieces have newer entries of an episode
            self._enter(np.full(len(numbers), task), numbers.numpy(), values.numpy(), slice(None))

    def _append(self, rows: Float[Tensor, "task count width"]) -> None:
        first = self.written + max(0, rows.shape[1] - self.ring)  # skip rows that do not fit
        rows = rows[:, first - self.written :]
        start = first % self.ring
        head = min(rows.shape[1], self.ring - start)
        rows = self._to_device(rows)
        self.rows[:, start : start + head] = rows[:, :head]
        self.rows[:, : rows.shape[1] - head] = rows[:, head:]
        self.written = first + rows.shape[1]

    def _number(self, begins: NDArray[np.bool_]) -> Numbers:
        """Return the episode numbers `[task, copy, step]`, assigned in row order."""
        by_step = begins.swapaxes(1, 2)  # (task, step, copy)
        new = self.running.max(1)[:, None] + by_step.reshape(len(begins), -1).cumsum(1)
        numbers = np.where(by_step, new.reshape(by_step.shape), -1)
        numbers = np.maximum(np.maximum.accumulate(numbers, 1), self.running[:, None])
        self.running = numbers[:, -1]
        return numbers.swapaxes(1, 2)

    def _enter(self, tasks: Numbers, numbers: Numbers, values: Floats, columns: slice) -> None:
        """Write some columns of the entries of episodes `(tasks[i], numbers[i])`."""
        slots = self.episodes.shape[1]
        needed = numbers >= self._oldest[tasks]
        slot = self._to_device(torch.from_numpy((tasks * slots + numbers % slots)[needed]))
        self.episodes.flatten(0, 1)[:, columns].index_copy_(
            0, slot, self._to_device(torch.from_numpy(values[needed]))
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the replay's device without waiting, from pinned memory."""
        if not self.rows.is_cuda:
            return tensor
        return tensor.contiguous().pin_memory().to(self.rows.device, non_blocking=True)

    def _make_room(self) -> None:
        """Ensure a separate slot for every episode from `_oldest` to the newest.

        Update `_oldest` first. If that is not enough, because faults made many short episodes,
        enlarge the table.
        """
        newest = self.running.max(1)
        slots = self.episodes.shape[1]
        if (newest - self._oldest).max() < slots:
            return
        self._oldest = self._lowest()
        needed = int((newest - self._oldest).max()) + 1
        if needed <= slots:
            return
        larger = self.episodes.new_empty(self.spec.num_tasks, 2 * needed, self.spec.obs_dim)
        for task, oldest in enumerate(self._oldest):
            # This also copies slots that no episode uses yet.
            numbers = torch.arange(oldest, oldest + slots, device=self.device)
            larger[task, numbers % (2 * needed)] = self.episodes[task, numbers % slots]
        self.episodes = larger

    def _lowest(self) -> Numbers:
        """Return the lowest episode number in the stored rows of each task."""
        rows = self.rows[:, : min(self.written, self.ring), -1]
        lowest: Numbers = rows.amin(1).cpu().numpy().astype(np.int64)
        return lowest

    # --- reading ----------------------------------------------------------------------------------

    def since(self, first: int) -> Piece:
        """Return the rows from number `first` on, with the entries of their episodes."""
        slots = self.episodes.shape[1]
        rows = self.rows[:, torch.arange(first, self.written, device=self.device) % self.ring].cpu()
        lowest: Numbers = rows[..., -1].amin(1).numpy().astype(np.int64)
        count = self.running.max(1) + 1 - lowest
        entries = torch.zeros(self.spec.num_tasks, int(count.max()), self.spec.obs_dim)
        for task in range(self.spec.num_tasks):
            numbers = rows[task, :, -1].unique().long()
            entries[task, numbers - lowest[task]] = self.episodes[task].cpu()[numbers % slots]
        return Piece(rows, torch.from_numpy(lowest), entries)

    def newest(self, count: int) -> Float[Tensor, "task count obs"]:
        """Return up to `count` observations of each task, the newest last."""
        numbers = torch.arange(
            self.written - min(count, self.size), self.written, device=self.device
        )
        numbers = numbers.expand(self.spec.num_tasks, -1)
        state, _, _, episode = self._rows(numbers).split(self.widths, -1)
        return self._observation(numbers, state, episode, self._entries(episode))

    def sample(
        self, batch: int, generator: torch.Generator, n_step: int = 1, discount: float = 0.99
    ) -> Batch:
        """Draw `batch` transitions of each task with a generator on the replay's device.

        A transition spans `n_step` steps, or fewer if its episode ends earlier or has no further
        steps yet.

        Raises:
            ValueError: the replay is empty.
        """
        if not self.size:
            raise ValueError("cannot sample from an empty replay")
        draws = torch.randint(
            self.size, (self.spec.num_tasks, batch), generator=generator, device=self.device
        )
        number = draws + (self.written - self.size)  # row numbers
        return self._transitions(number, n_step, discount)

    def sample_at(
        self, words: Int[Tensor, "number task batch"], n_step: int, discount: float
    ) -> Batch:
        """Select the transitions of several updates by random words, `[number, task, batch, ...]`.

        Only tensors on the device determine the result. A CUDA graph that samples therefore stays
        valid while the replay grows, until `rows` or `episodes` is another tensor. The replay must
        not be empty.

        Args:
            words: random 32-bit words (see `softmod.counter`).
            n_step, discount: as in `sample`.
        """
        size = self.end.clamp(max=self.capacity)
        return self._transitions(integers(words, size) + (self.end - size), n_step, discount)

    def all_of(self, task: int) -> tuple[Batch, Int[Tensor, " count"]]:
        """Return all transitions of one task that can be drawn, oldest first, `[1, count, ...]`.

        Returns:
            The transitions over one step, and the numbers of their episodes.
        """
        one = Replay(replace(self.spec, tasks=(self.spec.tasks[task],)), 0, "meta", self.copies)
        one.ring = self.ring
        one.end = self.end
        one.written = self.written
        one.rows = self.rows[task : task + 1]
        one.episodes = self.episodes[task : task + 1]
        number = torch.arange(self.written - self.size, self.written, device=self.device)[None]
        return one._transitions(number, 1, 1.0), one._rows(number)[0, :, -1].long()

    def _transitions(
        self, number: Int[Tensor, "*update task batch"], n_step: int, discount: float
    ) -> Batch:
        """Return the transitions that start at the given rows."""
        state, action, reward, episode = self._rows(number).split(self.widths, -1)
        total = reward.squeeze(-1)
        factor = torch.full_like(reward.squeeze(-1), discount)
        last = number
        goes_on = torch.ones_like(number, dtype=torch.bool)
        for _ in range(n_step - 1):
            last, reward_after, goes_on = self._step_on(last, episode, goes_on)
            total = total + factor * reward_after
            factor = torch.where(goes_on, factor * discount, factor)
        entry = self._entries(episode)
        obs = self._observation(number, state, episode, entry)
        last_state = self._rows(last)[..., : self.spec.state_dim] if n_step > 1 else state
        return Batch(
            obs, action, total, self._next_observation(last, last_state, episode, entry), factor
        )

    def _step_on(
        self,
        number: Int[Tensor, "*update task batch"],
        episode: Float[Tensor, "*update task batch 1"],
        goes_on: Bool[Tensor, "*update task batch"],
    ) -> tuple[
        Int[Tensor, "*update task batch"],
        Float[Tensor, "*update task batch"],
        Bool[Tensor, "*update task batch"],
    ]:
        """Step to the next row of each transition's episode.

        Returns:
            The next row's number and reward, and whether there is a next row in the episode; if
            there is none, the same number and 0.
        """
        after = number + self.copies
        goes_on = goes_on & (after < self.end)
        reward, of = self._rows(torch.where(goes_on, after, number))[..., -2:].unbind(-1)
        goes_on = goes_on & (of == episode.squeeze(-1))
        return torch.where(goes_on, after, number), torch.where(goes_on, reward, 0.0), goes_on

    def _observation(
        self,
        number: Int[Tensor, "*update task batch"],
        state: Tensor,
        episode: Float[Tensor, "*update task batch 1"],
        entry: Tensor,
    ) -> Float[Tensor, "*update task batch obs"]:
        """Compose observations of state, previous state, and the constant part."""
        if not self.spec.frame:
            return state
        earlier, _, _, of = self._rows(number - self.copies).split(self.widths, -1)
        follows = (of == episode) & (number >= self.copies).unsqueeze(-1)
        _, first_before, constant = self._parts(entry)
        return torch.cat([state, torch.where(follows, earlier, first_before), constant], -1)

    def _next_observation(
        self,
        last: Int[Tensor, "*update task batch"],
        state: Tensor,
        episode: Float[Tensor, "*update task batch 1"],
        entry: Tensor,
    ) -> Float[Tensor, "*update task batch obs"]:
        """Compose the observations that follow the rows `last`, whose states are `state`."""
        end, _, constant = self._parts(entry)
        after = last + self.copies
        written = after < self.end
        later, _, _, of = self._rows(torch.where(written, after, last)).split(self.widths, -1)
        goes_on = (of == episode) & written.unsqueeze(-1)
        following = torch.where(goes_on, later, end)
        return torch.cat([following, state, constant], -1) if self.spec.frame else following

    def _parts(self, entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split entries into final state, state before the first step, and constant part."""
        state = self.spec.state_dim
        frame = self.spec.frame
        end, before, constant = entry.split((state, frame, self.spec.obs_dim - state - frame), -1)
        return end, before, constant

    def _entries(
        self, episode: Float[Tensor, "*update task batch 1"]
    ) -> Float[Tensor, "*update task batch obs"]:
        slot = episode.squeeze(-1).long() % self.episodes.shape[1]
        return gather(self.episodes, slot)

    def _rows(
        self, number: Int[Tensor, "*update task batch"]
    ) -> Float[Tensor, "*update task batch width"]:
        return gather(self.rows, number % self.ring)


def gather(
    of: Float[Tensor, "task many width"], which: Int[Tensor, "*update task batch"]
) -> Float[Tensor, "*update task batch width"]:
    """Select rows of every task by index; leading axes of the index are kept."""
    tasks, many, _ = of.shape
    first = torch.arange(0, tasks * many, many, device=of.device)
    return (
        of.flatten(0, 1)
        .index_select(0, (which + first[:, None]).flatten())
        .unflatten(0, which.shape)
    )


def bytes_per_transition(spec: EnvSpec) -> float:
    """Return the bytes per transition: its row, and its share of two entries per episode."""
    return 4.0 * (spec.state_dim + spec.action_dim + 2 + 2 * spec.obs_dim / spec.episode_steps)


def random_rollout(spec: EnvSpec, steps: int, copies: int = 1, seed: int = 0) -> Rollout:
    """Generate a round of random experience for benchmarks and tests.

    The first step begins an episode.
    """
    draws = np.random.default_rng(seed)
    shape = (spec.num_tasks, copies, steps)
    state = spec.state_dim
    frame = spec.frame
    obs = draws.standard_normal((*shape, spec.obs_dim), np.float32)
    after = draws.standard_normal((*shape, spec.obs_dim), np.float32)
    begins = np.broadcast_to(np.arange(steps) % spec.episode_steps == 0, shape).copy()
    inside = ~begins[:, :, 1:, None]
    for step in range(steps):
        if step:
            obs[:, :, step] = np.where(
                inside[:, :, step - 1], after[:, :, step - 1], obs[:, :, step]
            )
        after[:, :, step, state:] = obs[:, :, step, state:]
        after[:, :, step, state : state + frame] = obs[:, :, step, :frame]
    action = draws.uniform(-1, 1, (*shape, spec.action_dim)).astype(np.float32)
    return Rollout(obs, action, draws.standard_normal(shape, np.float32), after, begins)


def check(rollout: Rollout, spec: EnvSpec) -> None:
    """Check that observations are composed as `EnvSpec.frame` declares.

    Raises:
        WorkerError: they are not; the message names the first such task.
    """
    state = spec.state_dim
    frame = spec.frame
    inside = ~rollout.begins[:, :, 1:, None]
    obs = rollout.obs
    after = rollout.next_obs
    flaws = {
        "the next observation does not hold the previous state": (
            after[..., state : state + frame] != obs[..., :frame]
        ),
        "the constant part changes within an episode": (
            after[..., state + frame :] != obs[..., state + frame :]
        ),
        "an observation differs from the next observation of the step before": (
            (obs[:, :, 1:] != after[:, :, :-1]) & inside
        ),
    }
    for flaw, differs in flaws.items():
        if differs.any():
            task = spec.tasks[int(np.argwhere(differs)[0][0])]
            raise WorkerError(f"{task}: {flaw} (EnvSpec.frame={frame})")
