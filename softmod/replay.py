"""The replay: a packed row per transition, `[task, capacity, width]` on the learner's device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmod.types import EnvSpec, Rollout


class Batch(NamedTuple):
    """Transitions over one step or several, with tasks as an axis.

    `reward` is the discounted sum of the rewards of a transition's steps, `discount` is what the value of `next_obs`
    counts. Every transition bootstraps: an episode only ends by its time limit (9).
    """

    obs: Float[Tensor, "task batch obs"]
    action: Float[Tensor, "task batch action"]
    reward: Float[Tensor, "task batch"]
    next_obs: Float[Tensor, "task batch obs"]
    discount: Float[Tensor, "task batch"]


class Replay:
    """The last `capacity` transitions of each task; draws are independent per task (10), with replacement.

    Transitions are stored step by step, and within a step copy by copy. So the successor of a transition lies `copies`
    rows further, unless an episode begins there.

    Args:
        spec: sizes and number of tasks.
        capacity: transitions kept per task.
        device: where rows lie and batches come from.
        copies: environments per task.
    """

    def __init__(self, spec: EnvSpec, capacity: int, device: torch.device | str = "cpu", copies: int = 1) -> None:
        self.spec, self.capacity, self.copies = spec, capacity, copies
        self.widths = (spec.obs_dim, spec.action_dim, 1, spec.obs_dim, 1)
        self.rows = torch.empty(spec.num_tasks, capacity, sum(self.widths), device=device)
        self.written = 0  # transitions per task ever written; the cursor is this modulo the capacity

    @property
    def size(self) -> int:
        """Transitions per task that can be drawn."""
        return min(self.written, self.capacity)

    def extend(self, rollout: Rollout) -> None:
        """Append a round of every task, `[task, copy, step, ...]`; where it wraps around, the oldest rows go."""
        begins = rollout.begins[..., None].astype(np.float32)
        parts = (rollout.obs, rollout.action, rollout.reward[..., None], rollout.next_obs, begins)
        by_step = np.concatenate(parts, -1).swapaxes(1, 2)  # (task, step, copy, width)
        self.append(torch.from_numpy(by_step.reshape(self.spec.num_tasks, -1, sum(self.widths))))

    def append(self, packed: Float[Tensor, "task count width"]) -> None:
        """Append packed rows, the same number for every task."""
        first = self.written + max(0, packed.shape[1] - self.capacity)  # more than fits: only the newest
        packed = packed[:, first - self.written :]
        if self.rows.is_cuda:  # from pinned memory, the copy does not keep the learner waiting
            packed = packed.contiguous().pin_memory().to(self.rows.device, non_blocking=True)
        start = first % self.capacity
        head = min(packed.shape[1], self.capacity - start)
        self.rows[:, start : start + head] = packed[:, :head]
        self.rows[:, : packed.shape[1] - head] = packed[:, head:]
        self.written = first + packed.shape[1]

    def newest(self, count: int) -> Float[Tensor, "task count obs"]:
        """The last observations of each task, the newest last; fewer where there are fewer."""
        slots = torch.arange(self.written - min(count, self.size), self.written) % self.capacity
        return self.rows[:, slots.to(self.rows.device), : self.spec.obs_dim]

    def sample(self, batch: int, generator: torch.Generator, n_step: int = 1, discount: float = 0.99) -> Batch:
        """Draw `batch` transitions of each task with a generator of the replay's device.

        Each one spans `n_step` steps, fewer where its episode ends or the newest transition comes before.

        Raises:
            ValueError: nothing was written yet.
        """
        if not self.size:
            raise ValueError("the replay is empty: nothing can be drawn from it")
        draws = torch.randint(self.size, (self.spec.num_tasks, batch), generator=generator, device=self.rows.device)
        number = draws + (self.written - self.size)  # of the transition, since the run's beginning
        obs, action, reward, next_obs, _ = self._rows(number).split(self.widths, -1)
        total, factor = reward.squeeze(-1), torch.full_like(reward.squeeze(-1), discount)
        last, goes_on = number, torch.ones_like(number, dtype=torch.bool)
        for _ in range(n_step - 1):
            last, reward_after, goes_on = self._step_on(last, goes_on)
            total = total + factor * reward_after
            factor = torch.where(goes_on, factor * discount, factor)
        if n_step > 1:
            next_obs = self._rows(last).split(self.widths, -1)[3]
        return Batch(obs, action, total, next_obs, factor)

    def _step_on(
        self, number: Int[Tensor, "task batch"], goes_on: Bool[Tensor, "task batch"]
    ) -> tuple[Int[Tensor, "task batch"], Float[Tensor, "task batch"], Bool[Tensor, "task batch"]]:
        """Each transition's successor and its reward; the same transition and 0 where there is none in its episode."""
        after = number + self.copies
        goes_on = goes_on & (after < self.written)
        after = torch.where(goes_on, after, number)
        reward, begins = self._column(after, -self.widths[3] - 2), self._column(after, -1)
        goes_on = goes_on & (begins == 0)
        return torch.where(goes_on, after, number), torch.where(goes_on, reward, 0.0), goes_on

    def _places(self, number: Int[Tensor, "task batch"]) -> Int[Tensor, " rows"]:
        """Where transitions lie among the rows of all tasks."""
        first = torch.arange(0, self.rows.shape[0] * self.capacity, self.capacity, device=self.rows.device)
        return (number % self.capacity + first[:, None]).flatten()

    def _rows(self, number: Int[Tensor, "task batch"]) -> Float[Tensor, "task batch width"]:
        return self.rows.flatten(0, 1).index_select(0, self._places(number)).unflatten(0, number.shape)

    def _column(self, number: Int[Tensor, "task batch"], column: int) -> Float[Tensor, "task batch"]:
        return self.rows.flatten(0, 1)[:, column].index_select(0, self._places(number)).unflatten(0, number.shape)
