"""Toy tasks that fail on demand, for tests; `allow=[tests]` lets a command line name them."""

from __future__ import annotations

import os
import time
from typing import Any

from softmod.envs.toy import Toy


class Faulty(Toy):
    """The toy tasks, where the second one fails as its name says: build, raise, die, hang or interrupt.

    `name` is `<fault>` or `<fault>-<step>`: the environment step of an environment at which it happens.
    """

    def make(self, task: int, render: bool = False) -> Any:
        fault, _, at = self.name.partition("-")
        if task != 1:
            return super().make(task, render)
        if fault == "build":
            raise RuntimeError("this environment cannot be built")
        return Wrapped(super().make(task, render), fault, int(at or 1))


class Wrapped:
    """An environment that fails at a step."""

    def __init__(self, env: Any, fault: str, at: int) -> None:
        self.env, self.fault, self.at, self.count = env, fault, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            if self.fault == "raise":
                raise RuntimeError("the simulation broke")
            if self.fault == "die":
                os._exit(9)
            if self.fault == "hang":
                time.sleep(600)
        obs, reward, success = self.env.step(action)
        if self.fault == "nan" and self.count >= self.at:
            reward = float("nan")
        return obs, reward, success
