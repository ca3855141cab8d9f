"""Toy tasks that fail on demand, for tests."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from softmod.envs.toy import Toy
from softmod.errors import PhysicsError


class Faulty(Toy):
    """The toy tasks, where the second one fails as its name says: build, raise, physics, die, hang
    or nan.

    `name` is `<fault>` or `<fault>-<step>`: the environment step of an environment at which it
    happens. With a `marker`, a path, it happens once in all processes together.
    """

    marker: Path | None = None

    def make(self, task: int, render: bool = False) -> Any:
        fault, _, at = self.name.partition("-")
        if task != 1:
            return super().make(task, render)
        if fault == "build" and due(self.marker):
            raise RuntimeError("this environment cannot be built")
        return Wrapped(super().make(task, render), fault, int(at or 1), self.marker)


class Once(Faulty):
    """It fails once in all processes of a run together, whatever folder that runs in."""

    marker = Path("failed-once")


class Orphan(Faulty):
    """Its processes do not end with their parent."""

    def make(self, task: int, render: bool = False) -> Any:
        if multiprocessing.parent_process() is not None:
            os._exit = lambda code: None  # type: ignore[assignment, return-value]
        return super().make(task, render)


class Leaky(Toy):
    """Every step keeps some memory."""

    kept: ClassVar[list[bytearray]] = []

    def make(self, task: int, render: bool = False) -> Any:
        env = super().make(task, render)
        step = env.step

        def leaking(action: Any) -> Any:
            self.kept.append(bytearray(2_000))
            return step(action)

        env.step = leaking
        return env


class AlwaysBroken(Faulty):
    """The second task fails in every episode, at the same step."""

    def make(self, task: int, render: bool = False) -> Any:
        env = super().make(task, render)
        if task == 1:
            begin = env.reset

            def reset(goal: Any) -> Any:
                env.count = 0
                return begin(goal)

            env.reset = reset
        return env


def due(marker: Path | None) -> bool:
    """Whether the fault has not happened yet; it has now."""
    if marker is None:
        return True
    new = not marker.exists()
    marker.touch()
    return new


class Wrapped:
    """An environment that fails at a step."""

    def __init__(self, env: Any, fault: str, at: int, marker: Path | None) -> None:
        self.env, self.fault, self.at, self.marker, self.count = env, fault, at, marker, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: Any) -> Any:
        self.count += 1
        if (
            self.count == self.at
            and self.fault in ("raise", "die", "hang", "physics")
            and due(self.marker)
        ):
            if self.fault == "raise":
                raise RuntimeError("the simulation broke")
            if self.fault == "physics":
                raise PhysicsError("the physics broke")
            if self.fault == "die":
                os._exit(9)
            if self.fault == "hang":
                time.sleep(600)
        obs, reward, success = self.env.step(action)
        if self.fault == "nan" and self.count >= self.at:
            reward = float("nan")
        return obs, reward, success
