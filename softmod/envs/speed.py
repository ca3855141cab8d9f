"""`python -m softmod.envs.speed`: steps per second of Meta-World's environments, of ours, and of the physics alone.

On one core, one environment per task, random actions made beforehand. The three take turns, so that whatever else the
machine does meets all of them; figures are medians of several episodes. "Physics alone" is what a step cannot do
without: five MuJoCo steps and one `mj_forward`, moved by the same actions; the time of the moving itself is taken off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from softmod.envs.proof import Pair
from softmod.envs.tasks import MT50, REWARDS, SETS, check_tasks
from softmod.errors import SoftmodError
from softmod.types import Floats

WAYS = ("plain", "fast", "physics")


def stepping(env: Any, actions: Floats) -> float:
    """Seconds that an environment takes for these actions `[steps, 4]`."""
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return time.perf_counter() - start


def simulating(env: Any, actions: Floats) -> float:
    """Seconds that the physics alone takes for them."""
    from mujoco import mj_forward, mj_step

    model, data = env.model, env.data
    place, control = data.mocap_pos[0], data.ctrl
    moves = [(action[:3] * 0.01, (action[3], -action[3])) for action in actions.astype(np.float64)]
    seconds = 0.0
    for sign in (1, -1):  # the second pass only moves, and is taken off
        start = time.perf_counter()
        for by, grip in moves:
            place[:] = np.minimum(np.maximum(place + by, env.mocap_low), env.mocap_high)
            control[:] = grip
            if sign > 0:
                mj_step(model, data, 5)
                mj_forward(model, data)
        seconds += sign * (time.perf_counter() - start)
    return seconds


def measure(task: str, reward: str, rounds: int, steps: int) -> list[float]:
    """Steps per second of a task in the three ways of WAYS."""
    pair, seconds = Pair(task), [[0.0] * rounds for _ in WAYS]
    goal, actions = pair.goal(0), np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
    for turn in range(rounds):
        for way, (run, env) in enumerate([(stepping, pair.plain), (stepping, pair.fast), (simulating, pair.fast)]):
            pair.reset(env, goal, reward)
            seconds[way][turn] = run(env, actions)
    return [steps / median(taken) for taken in seconds]


def main(arguments: Sequence[str] | None = None) -> int:
    """A line per task and the means; 0, or 2 for an unknown task."""
    parser = argparse.ArgumentParser(prog="python -m softmod.envs.speed", description="Steps per second, three ways.")
    parser.add_argument("--tasks", nargs="+", default=["mt10"], help="tasks or sets of tasks (default: mt10)")
    parser.add_argument("--reward", choices=REWARDS, default="v2")
    parser.add_argument("--rounds", type=int, default=7, help="episodes of which the median counts (default: 7)")
    parser.add_argument("--steps", type=int, default=500, help="steps per episode (default: 500)")
    chosen = parser.parse_args(arguments)
    try:
        tasks = check_tasks([name for word in chosen.tasks for name in SETS.get(word, (word,))], MT50)
    except SoftmodError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{'steps/s':<30}" + "".join(f"{way:>9}" for way in WAYS) + "  fast/physics")
    rates = []
    for task in tasks:
        rates.append(measure(task, chosen.reward, chosen.rounds, chosen.steps))
        _line(task, rates[-1])
    _line("mean", [1 / fmean(1 / rate for rate in way) for way in zip(*rates, strict=True)])  # of one step of each
    return 0


def _line(name: str, rates: Sequence[float]) -> None:
    print(f"{name:<30}" + "".join(f"{rate:>9.0f}" for rate in rates) + f"{rates[1] / rates[2]:>13.0%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
