"""The clock of a run: it counts environment steps over all tasks.

Environment steps are the x-axis of every metric and the unit of every cadence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from softmod.spec import EnvSpec, Rollout

ENOUGH = 2  # consecutive evaluations at the target rate before the tasks count as solved


@dataclass
class Clock:
    """The progress counters of a run. `seconds` is the loop time over all sessions."""

    env_steps: int = 0
    rounds: int = 0
    seconds: float = 0.0
    previous: int = 0  # env_steps before the last round
    success: list[float] = field(default_factory=list)  # mean rates of the last two evaluations
    stopped: bool = False  # by a callback
    _since: float = field(default_factory=time.monotonic, repr=False)

    def start(self) -> None:
        """Start the timer."""
        self._since = time.monotonic()

    def advance(self, rollout: Rollout) -> None:
        """Add a finished round."""
        self.previous = self.env_steps
        self.env_steps += rollout.env_steps
        self.rounds += 1
        self.tick()

    def tick(self) -> float:
        """Add the time since the last tick; return the total in seconds."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        return self.seconds

    def passed(self, every: int) -> bool:
        """Return whether the last round reached a multiple of `every` environment steps."""
        return self.env_steps // every > self.previous // every

    def will_pass(self, every: int, steps: int) -> bool:
        """Return whether a round of `steps` environment steps would reach a multiple of `every`."""
        return (self.env_steps + steps) // every > self.env_steps // every

    def evaluated(self, success: float) -> None:
        """Record the mean success rate of an evaluation."""
        self.success = [*self.success, success][-ENOUGH:]

    def solved(self, success: float | None) -> bool:
        """Return whether the last two evaluations reached a mean success rate; never for None."""
        return success is not None and len(self.success) == ENOUGH and min(self.success) >= success

    def facts(self) -> dict[str, Any]:
        """Return the counters for a checkpoint."""
        counters = {"env_steps": self.env_steps, "rounds": self.rounds, "previous": self.previous}
        moments = {"seconds": self.tick(), "success": self.success}
        return counters | moments | ({"stopped": True} if self.stopped else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Set the counters to those of a checkpoint."""
        self.env_steps = int(state["env_steps"])
        self.rounds = int(state["rounds"])
        self.seconds = float(state["seconds"])
        self.previous = int(state["previous"])
        self.success = [float(rate) for rate in state["success"]]
        self.stopped = bool(state.get("stopped"))


@dataclass(frozen=True)
class Schedule:
    """The number of updates per round: `ratio` updates per step of each task, after the warm-up.

    Fractions accumulate: `n` steps per task after the warm-up, `floor(ratio n)` updates were made.
    """

    spec: EnvSpec
    warmup_per_task: int
    ratio: float
    steps_per_round: int  # per task, over all copies

    @property
    def env_steps(self) -> int:
        """Return the environment steps of a round, over all tasks."""
        return self.steps_per_round * self.spec.num_tasks

    def warming_up(self, env_steps: int) -> bool:
        """Return whether the round that starts at `env_steps` is part of the warm-up."""
        return env_steps // self.spec.num_tasks < self.warmup_per_task

    def updates(self, env_steps: int) -> int:
        """Return the number of updates in the round that starts at `env_steps`.

        These updates sample the transitions of earlier rounds.
        """
        held = env_steps // self.spec.num_tasks
        before = held - self.warmup_per_task
        if before < 0 or held == 0:
            return 0
        return int((before + self.steps_per_round) * self.ratio) - int(before * self.ratio)
