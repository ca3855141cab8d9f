"""One clock: environment steps over all tasks, the x-axis of every metric and the unit of every
cadence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from softmod.spec import EnvSpec, Rollout

ENOUGH = 2  # evaluations in a row that have to agree that a run has solved its tasks


@dataclass
class Clock:
    """Count how far a run is. `seconds` is the time spent in the loop, over all its sessions."""

    env_steps: int = 0
    rounds: int = 0
    seconds: float = 0.0
    previous: int = 0  # env_steps before the last round
    success: list[float] = field(default_factory=list)  # mean rates of the last two evaluations
    stopped: bool = False  # by a callback
    _since: float = field(default_factory=time.monotonic, repr=False)

    def start(self) -> None:
        """Time runs from now."""
        self._since = time.monotonic()

    def advance(self, rollout: Rollout) -> None:
        """A round was finished."""
        self.previous = self.env_steps
        self.env_steps += rollout.env_steps
        self.rounds += 1
        self.tick()

    def tick(self) -> float:
        """Add the time since the last tick; the seconds so far."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        return self.seconds

    def passed(self, every: int) -> bool:
        """Return whether the last round reached a multiple of `every` environment steps."""
        return self.env_steps // every > self.previous // every

    def will_pass(self, every: int, steps: int) -> bool:
        """Return whether a round of so many steps reaches a multiple of `every`."""
        return (self.env_steps + steps) // every > self.env_steps // every

    def evaluated(self, success: float) -> None:
        """An evaluation was made; its mean success rate."""
        self.success = [*self.success, success][-ENOUGH:]

    def solved(self, success: float | None) -> bool:
        """Return whether the last two evaluations both reached this mean success rate; None is
        never reached.
        """
        return success is not None and len(self.success) == ENOUGH and min(self.success) >= success

    def facts(self) -> dict[str, Any]:
        counters = {"env_steps": self.env_steps, "rounds": self.rounds, "previous": self.previous}
        moments = {"seconds": self.tick(), "success": self.success}
        return counters | moments | ({"stopped": True} if self.stopped else {})

    def restore(self, facts: dict[str, Any]) -> None:
        self.env_steps = int(facts["env_steps"])
        self.rounds = int(facts["rounds"])
        self.seconds = float(facts["seconds"])
        self.previous = int(facts["previous"])
        self.success = [float(rate) for rate in facts["success"]]
        self.stopped = bool(facts.get("stopped"))


@dataclass(frozen=True)
class Schedule:
    """Say how many updates a round makes: `ratio` per step of every task, once the warm-up is in
    the replay.

    Fractions add up: after n steps per task beyond the warm-up, `floor(ratio n)` updates were made.
    """

    spec: EnvSpec
    warmup_per_task: int
    ratio: float
    steps_per_round: int  # of every task, all copies together

    @property
    def env_steps(self) -> int:
        """Of a round, over all tasks."""
        return self.steps_per_round * self.spec.num_tasks

    def warming_up(self, env_steps: int) -> bool:
        """Return whether the round that begins at `env_steps` comes before the first update."""
        return env_steps // self.spec.num_tasks < self.warmup_per_task

    def updates(self, env_steps: int) -> int:
        """Updates of the round that begins at `env_steps`, on what the replay held before."""
        held = env_steps // self.spec.num_tasks
        before = held - self.warmup_per_task
        if before < 0 or held == 0:
            return 0
        return int((before + self.steps_per_round) * self.ratio) - int(before * self.ratio)
