"""Updates of seeds side by side in one process, and of the same seeds alone, on equal cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.pairing import Figure, alternate
from benchmarks.updates import built
from softmod.agent.group import Group

SEEDS = 5
UPDATES = 20  # of each seed, in a turn
CASES = ("quickstart", "mt10")
SIDE_BY_SIDE = "side by side, {} threads"
IN_A_ROW = "one after another, {} threads"
AT_A_TIME = "{} at a time, one thread each"


def measure(experiment: str, cores: int, turns: int) -> list[Figure]:
    """Measure updates of all seeds per second, in three ways.

    The seeds run one after another, one per core at a time, and side by side as a group.
    """
    made = [built(experiment, [f"seed={seed}"])[:2] for seed in range(SEEDS)]
    agents, replays = [agent for agent, _ in made], [replay for _, replay in made]
    group = Group(agents, cores)

    def in_a_row(threads: int) -> None:
        torch.set_num_threads(threads)
        for agent, replay in made:
            agent.learn(replay, UPDATES)

    def at_a_time() -> None:
        # Threads suffice: recorded updates run in PyTorch, which releases the interpreter lock.
        torch.set_num_threads(1)
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda pair: pair[0].learn(pair[1], UPDATES), made))

    def side_by_side() -> None:
        torch.set_num_threads(1)
        group.learn(replays, [UPDATES] * SEEDS)

    in_a_row(1)  # records each agent's operations
    ways: dict[str, Callable[[], None]] = {
        IN_A_ROW.format(1): lambda: in_a_row(1),
        IN_A_ROW.format(cores): lambda: in_a_row(cores),
        AT_A_TIME.format(cores): at_a_time,
        SIDE_BY_SIDE.format(cores): side_by_side,
    }
    return alternate({name: _rate(way) for name, way in ways.items()}, "seed-updates/s", turns)


def _rate(way: Callable[[], None]) -> Callable[[], float]:
    """Return a function that measures seed-updates per second of a way to make them."""

    def rate() -> float:
        began = time.perf_counter()
        way()
        return SEEDS * UPDATES / (time.perf_counter() - began)

    return rate
