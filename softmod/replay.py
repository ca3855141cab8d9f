"""The replay: a packed row per transition, `[task, capacity, width]` on the learner's device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmod.types import EnvSpec, Rollout


class Batch(NamedTuple):
    """Transitions with tasks as an axis. Every one bootstraps: an episode only ends by its time limit (9)."""

    obs: Float[Tensor, "task batch obs"]
    action: Float[Tensor, "task batch action"]
    reward: Float[Tensor, "task batch"]
    next_obs: Float[Tensor, "task batch obs"]


class Replay:
    """The last `capacity` transitions of each task; draws are independent per task (10), with replacement.

    Args:
        spec: sizes and number of tasks.
        capacity: transitions kept per task.
        device: where rows lie and batches come from.
    """

    def __init__(self, spec: EnvSpec, capacity: int, device: torch.device | str = "cpu") -> None:
        self.spec, self.capacity = spec, capacity
        self.widths = (spec.obs_dim, spec.action_dim, 1, spec.obs_dim)
        self.rows = torch.empty(spec.num_tasks, capacity, sum(self.widths), device=device)
        self.written = 0  # transitions per task ever written; the cursor is this modulo the capacity

    @property
    def size(self) -> int:
        """Transitions per task that can be drawn."""
        return min(self.written, self.capacity)

    def extend(self, rollout: Rollout) -> None:
        """Append a round of every task, `[task, copy, step, ...]`; where it wraps around, the oldest rows go."""
        parts = (rollout.obs, rollout.action, rollout.reward[..., None], rollout.next_obs)
        packed = np.concatenate(parts, -1).reshape(self.spec.num_tasks, -1, sum(self.widths))
        self.append(torch.from_numpy(packed))

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

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """`batch` transitions of each task, drawn with a generator of the replay's device.

        Raises:
            ValueError: nothing was written yet.
        """
        if not self.size:
            raise ValueError("the replay is empty: nothing can be drawn from it")
        tasks, device = self.spec.num_tasks, self.rows.device
        slots = torch.randint(self.size, (tasks, batch), generator=generator, device=device)
        slots += torch.arange(0, tasks * self.capacity, self.capacity, device=device)[:, None]
        rows = self.rows.flatten(0, 1).index_select(0, slots.flatten()).view(tasks, batch, -1)
        obs, action, reward, next_obs = rows.split(self.widths, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs)
