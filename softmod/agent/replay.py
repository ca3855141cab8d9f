"""The replay: every state once, and once per episode what its rows do not hold, on the learner's
device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from softmod.errors import WorkerError
from softmod.spec import EnvSpec, Floats, Rollout

Numbers = NDArray[np.int64]


class Batch(NamedTuple):
    """Transitions over one step or several, with tasks as an axis.

    `reward` is the discounted sum of the rewards of a transition's steps, `discount` is what the
    value of `next_obs` counts. Every transition bootstraps: an episode only ends by its time limit
    (9).
    """

    obs: Float[Tensor, "task batch obs"]
    action: Float[Tensor, "task batch action"]
    reward: Float[Tensor, "task batch"]
    next_obs: Float[Tensor, "task batch obs"]
    discount: Float[Tensor, "task batch"]


class Piece(NamedTuple):
    """Some rows of a replay, on the CPU, and the entries of their episodes from a number on, which
    differs by task.

    Entries that no row belongs to are zeros.
    """

    rows: Float[Tensor, "task count width"]
    first_episode: Int[Tensor, " task"]
    episodes: Float[Tensor, "task episode obs"]


class Replay:
    """The last `capacity` transitions of each task; draws are independent per task (10), with
    replacement.

    A transition is a row: state, action, reward, and the number of its episode within its task. The
    next row of the episode holds the state after it, the row before the state before it. An entry
    per episode holds what rows do not: what its first observation has beside the state, and the
    state after its last transition so far. Batches are equal to the bit to those of a replay that
    keeps two whole observations per transition.

    Transitions are stored step by step, and within a step copy by copy. So the next row of an
    episode lies `copies` rows further. Rows and episodes are numbered from the run's beginning, per
    task; a row lies at its number modulo the ring, an entry at its episode's number modulo the
    slots. Numbers of episodes are floats in rows: exact up to 2^24.

    Args:
        spec: the number of tasks, and what an observation consists of.
        capacity: transitions kept per task.
        device: where rows lie and batches come from.
        copies: environments per task.
    """

    def __init__(
        self, spec: EnvSpec, capacity: int, device: torch.device | str = "cpu", copies: int = 1
    ) -> None:
        self.spec = spec
        self.capacity = capacity
        self.copies = copies
        self.widths = (spec.state_dim, spec.action_dim, 1, 1)
        self.ring = capacity + copies  # the oldest transitions' rows before them are kept too
        self.rows = torch.empty(spec.num_tasks, self.ring, sum(self.widths), device=device)
        slots = 2 * (self.ring // spec.episode_steps + copies + 1)
        self.episodes = torch.empty(spec.num_tasks, slots, spec.obs_dim, device=device)
        self.written = 0  # transitions per task ever written; the cursor is this modulo the ring
        self.running: Numbers = np.full(
            (spec.num_tasks, copies), -1
        )  # the episode of each environment
        self._oldest: Numbers = np.zeros(
            spec.num_tasks, np.int64
        )  # no row is of an episode before it; may be too low

    @property
    def device(self) -> torch.device:
        """Return the device that holds the rows and gives batches."""
        return self.rows.device

    @property
    def size(self) -> int:
        """Transitions per task that can be drawn."""
        return min(self.written, self.capacity)

    @property
    def first_row(self) -> int:
        """The number of the oldest row that is kept, counted from the run's beginning."""
        return max(0, self.written - self.ring)

    # --- writing ----------------------------------------------------------------------------------

    def extend(self, rollout: Rollout) -> None:
        """Append a round of every task, `[task, copy, step, ...]`; where it wraps around, the
        oldest rows go.

        Raises:
            WorkerError: its observations do not consist of what the `EnvSpec` says.
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
        by_step = np.concatenate(parts, -1, dtype=np.float32).swapaxes(
            1, 2
        )  # (task, step, copy, width)
        self._append(torch.from_numpy(by_step.reshape(self.spec.num_tasks, -1, sum(self.widths))))
        self._make_room()
        at_begin = np.nonzero(begins)[0], numbers[begins]
        self._enter(*at_begin, rollout.obs[..., state:][begins], slice(state, None))  # for good
        last = np.roll(begins, -1, 2)
        last[:, :, -1] = True
        at_end = np.nonzero(last)[0], numbers[last]
        self._enter(
            *at_end, rollout.next_obs[..., :state][last], slice(state)
        )  # until the episode goes on

    def restore(self, first: int, pieces: Iterable[Piece]) -> None:
        """Fill an empty replay with what `since` gave of another one, from its
        `first`-th row on.
        """
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
        self._oldest = self._lowest()  # only now, when all rows are there
        self._make_room()
        for task, numbers, values in entries:  # a later piece knows more of an episode that went on
            self._enter(np.full(len(numbers), task), numbers.numpy(), values.numpy(), slice(None))

    def _append(self, rows: Float[Tensor, "task count width"]) -> None:
        first = self.written + max(0, rows.shape[1] - self.ring)  # more than fits: only the newest
        rows = rows[:, first - self.written :]
        start = first % self.ring
        head = min(rows.shape[1], self.ring - start)
        rows = self._there(rows)
        self.rows[:, start : start + head] = rows[:, :head]
        self.rows[:, : rows.shape[1] - head] = rows[:, head:]
        self.written = first + rows.shape[1]

    def _number(self, begins: NDArray[np.bool_]) -> Numbers:
        """Return the episodes' numbers `[task, copy, step]`; new episodes are numbered in the order
        of their rows.
        """
        by_step = begins.swapaxes(1, 2)  # (task, step, copy)
        begun = self.running.max(1)[:, None] + by_step.reshape(len(begins), -1).cumsum(1)
        numbers = np.where(by_step, begun.reshape(by_step.shape), -1)
        numbers = np.maximum(np.maximum.accumulate(numbers, 1), self.running[:, None])
        self.running = numbers[:, -1]
        return numbers.swapaxes(1, 2)

    def _enter(self, tasks: Numbers, numbers: Numbers, values: Floats, columns: slice) -> None:
        """Write columns of the entries of episodes, each of which is a task's `number`-th."""
        slots = self.episodes.shape[1]
        needed = numbers >= self._oldest[tasks]
        slot = self._there(torch.from_numpy((tasks * slots + numbers % slots)[needed]))
        self.episodes.flatten(0, 1)[:, columns].index_copy_(
            0, slot, self._there(torch.from_numpy(values[needed]))
        )

    def _there(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the replay's device, from pinned memory, so that the learner does not
        wait.
        """
        if not self.rows.is_cuda:
            return tensor
        return tensor.contiguous().pin_memory().to(self.rows.device, non_blocking=True)

    def _make_room(self) -> None:
        """Let every episode from `_oldest` to the newest have a slot of its own.

        First by finding out which is the oldest; where that is not enough, since faults made many
        short episodes, in a larger table.
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
        for task, oldest in enumerate(
            self._oldest
        ):  # slots that no episode has yet are copied too, without harm
            numbers = torch.arange(oldest, oldest + slots, device=self.device)
            larger[task, numbers % (2 * needed)] = self.episodes[task, numbers % slots]
        self.episodes = larger

    def _lowest(self) -> Numbers:
        """The lowest number of an episode that rows belong to, per task."""
        rows = self.rows[:, : min(self.written, self.ring), -1]
        lowest: Numbers = rows.amin(1).cpu().numpy().astype(np.int64)
        return lowest

    # --- reading ----------------------------------------------------------------------------------

    def since(self, first: int) -> Piece:
        """Return the rows from the `first`-th on, with the entries of their episodes."""
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
        """The last observations of each task, the newest last; fewer where there are fewer."""
        numbers = torch.arange(
            self.written - min(count, self.size), self.written, device=self.device
        )
        numbers = numbers.expand(self.spec.num_tasks, -1)
        state, _, _, episode = self._rows(numbers).split(self.widths, -1)
        return self._observation(numbers, state, episode, self._entries(episode))

    def sample(
        self, batch: int, generator: torch.Generator, n_step: int = 1, discount: float = 0.99
    ) -> Batch:
        """Draw `batch` transitions of each task with a generator of the replay's device.

        Each one spans `n_step` steps, fewer where its episode ends or the newest transition comes
        before.

        Raises:
            ValueError: nothing was written yet.
        """
        if not self.size:
            raise ValueError("the replay is empty: nothing can be drawn from it")
        draws = torch.randint(
            self.size, (self.spec.num_tasks, batch), generator=generator, device=self.device
        )
        number = draws + (self.written - self.size)  # of the transition, since the run's beginning
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
        number: Int[Tensor, "task batch"],
        episode: Float[Tensor, "task batch 1"],
        goes_on: Bool[Tensor, "task batch"],
    ) -> tuple[Int[Tensor, "task batch"], Float[Tensor, "task batch"], Bool[Tensor, "task batch"]]:
        """Each transition's successor and its reward; the same transition and 0 where there is none
        in its episode.
        """
        after = number + self.copies
        goes_on = goes_on & (after < self.written)
        reward, of = self._rows(torch.where(goes_on, after, number))[..., -2:].unbind(-1)
        goes_on = goes_on & (of == episode.squeeze(-1))
        return torch.where(goes_on, after, number), torch.where(goes_on, reward, 0.0), goes_on

    def _observation(
        self,
        number: Int[Tensor, "task batch"],
        state: Tensor,
        episode: Float[Tensor, "task batch 1"],
        entry: Tensor,
    ) -> Float[Tensor, "task batch obs"]:
        """The observations of transitions: state, the state before, and what does not change."""
        if not self.spec.frame:
            return state
        earlier, _, _, of = self._rows(number - self.copies).split(self.widths, -1)
        follows = (of == episode) & (number >= self.copies).unsqueeze(-1)
        _, first_before, constant = self._parts(entry)
        return torch.cat([state, torch.where(follows, earlier, first_before), constant], -1)

    def _next_observation(
        self,
        last: Int[Tensor, "task batch"],
        state: Tensor,
        episode: Float[Tensor, "task batch 1"],
        entry: Tensor,
    ) -> Float[Tensor, "task batch obs"]:
        """The observations after transitions whose state is `state`."""
        end, _, constant = self._parts(entry)
        after = last + self.copies
        written = after < self.written
        later, _, _, of = self._rows(torch.where(written, after, last)).split(self.widths, -1)
        goes_on = (of == episode) & written.unsqueeze(-1)
        following = torch.where(goes_on, later, end)
        return torch.cat([following, state, constant], -1) if self.spec.frame else following

    def _parts(self, entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of an episode's entry: the state after its last transition, that before its first, what
        does not change.
        """
        state = self.spec.state_dim
        frame = self.spec.frame
        end, before, constant = entry.split((state, frame, self.spec.obs_dim - state - frame), -1)
        return end, before, constant

    def _entries(self, episode: Float[Tensor, "task batch 1"]) -> Float[Tensor, "task batch obs"]:
        slot = episode.squeeze(-1).long() % self.episodes.shape[1]
        return gather(self.episodes, slot)

    def _rows(self, number: Int[Tensor, "task batch"]) -> Float[Tensor, "task batch width"]:
        return gather(self.rows, number % self.ring)


def gather(
    of: Float[Tensor, "task many width"], which: Int[Tensor, "task batch"]
) -> Float[Tensor, "task batch width"]:
    """Pick rows of every task."""
    tasks, many, _ = of.shape
    first = torch.arange(0, tasks * many, many, device=of.device)
    return (
        of.flatten(0, 1)
        .index_select(0, (which + first[:, None]).flatten())
        .unflatten(0, which.shape)
    )


def bytes_per_transition(spec: EnvSpec) -> float:
    """Return what a transition takes: its row, and its share of two entries per episode."""
    return 4.0 * (spec.state_dim + spec.action_dim + 2 + 2 * spec.obs_dim / spec.episode_steps)


def random_rollout(spec: EnvSpec, steps: int, copies: int = 1, seed: int = 0) -> Rollout:
    """Make a round of random experience, for measurements and tests; its first step begins an
    episode.
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
    """Check that observations consist of what the replay will put them together from.

    Raises:
        WorkerError: naming the first task for which they do not.
    """
    state = spec.state_dim
    frame = spec.frame
    inside = ~rollout.begins[:, :, 1:, None]
    obs = rollout.obs
    after = rollout.next_obs
    flaws = {
        "the state one step before": after[..., state : state + frame] != obs[..., :frame],
        "what does not change within an episode": (
            after[..., state + frame :] != obs[..., state + frame :]
        ),
        "the observation after the step before": (obs[:, :, 1:] != after[:, :, :-1]) & inside,
    }
    for what, odd in flaws.items():
        if odd.any():
            task = spec.tasks[int(np.argwhere(odd)[0][0])]
            raise WorkerError(
                f"{task}: an observation does not hold {what} (EnvSpec.frame={frame})"
            )
