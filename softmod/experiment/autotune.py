"""What the cores at hand do: how many step environments, how many threads update. Measured once,
then remembered.

Equal states need equal numbers, so a resumed run keeps its own, and a repeated one finds the same
choice in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from softmod.system.files import written_whole
from softmod.system.hardware import available, processor

log = logging.getLogger(__name__)
RULE = 3  # another one when a choice is made in another way, so that older choices are made again
MEASURED_ROUNDS = 4
MEASURED_TASKS = 3  # of the set; enough for a mean, quick to build


@dataclass(frozen=True)
class Chosen:
    """Worker processes (0: inline) and threads of the learner."""

    processes: int
    threads: int


@dataclass(frozen=True)
class Costs:
    """Seconds that one update takes with so many threads, and an environment step in a worker."""

    update: Mapping[int, float]
    step: float


@dataclass(frozen=True)
class Round:
    """State the work of a round: updates, environment steps, and how many environments processes
    can share.

    `evaluated` are the steps of evaluations that come to a round, in which nothing is learned.
    """

    updates: float
    env_steps: int
    environments: int
    evaluated: float = 0.0


def thread_counts(cores: int = 0) -> list[int]:
    """1, 2, 4, ... and all of them."""
    cores = cores or available()
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def best(
    costs: Costs,
    wanted: Round,
    processes: int | None = None,
    threads: int | None = None,
    cores: int = 0,
) -> Chosen:
    """The choice with the shortest round; what is given stays as it is.

    Of equals the one with fewer of both.
    """
    cores = cores or available()
    most = max(1, min(cores, wanted.environments))
    choices = [
        Chosen(p, t)
        for p in ([processes] if processes is not None else range(1, most + 1))
        for t in ([threads] if threads else [count for count in costs.update if count <= cores])
    ]
    return min(
        choices,
        key=lambda choice: (
            round(seconds(costs, wanted, choice, cores), 6),
            choice.threads,
            choice.processes,
        ),
    )


def seconds(costs: Costs, wanted: Round, choice: Chosen, cores: int) -> float:
    """Estimate the seconds of a round: its longer half, and more where processes outnumber cores.

    Learner and workers then share the cores fairly until the shorter half is done, which slows the
    learner down.

    Several threads of an update wait for one another at every operation. While one of them shares
    its core with a worker, all of them are as slow as that one: both halves run at a share of their
    speed until the shorter is done.
    """
    learn = wanted.updates * costs.update[choice.threads]
    if not choice.processes:
        return learn + (wanted.env_steps + wanted.evaluated) * costs.step
    collect = wanted.env_steps * costs.step / choice.processes
    evaluate = wanted.evaluated * costs.step / choice.processes
    if choice.threads == 1:
        speed = min(1.0, cores / (choice.processes + 1))  # of each process, while all of them run
        shorter, longer = sorted((learn, collect))
        return shorter / speed + (longer - shorter) + evaluate
    on_a_core = -(-(choice.threads + choice.processes) // cores)
    return max(learn, collect) + (on_a_core - 1) * min(learn, collect) + evaluate


# --- remembering ----------------------------------------------------------------------------------


def remembered(
    folder: Path,
    question: Mapping[str, Any],
    measure: Callable[[], Costs],
    choose: Callable[[Costs], Chosen],
) -> Chosen:
    """The choice for this question on this machine; measured where it was never asked before."""
    about = {
        "rule": RULE,
        "machine": [platform.node(), platform.machine(), processor(), available()],
        **question,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"cores-{key}.json"
    try:
        return Chosen(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        chosen = choose(measure())
    try:
        with written_whole(path) as beside:
            beside.write_text(json.dumps(asdict(chosen)))
    except OSError as error:
        log.warning(
            "what was measured cannot be kept in %s (%s): it is measured again next time",
            folder,
            error,
        )
    return chosen


def timed(work: Callable[[], object], least: float = 0.5) -> float:
    """Return the seconds of a call, the median of several: the best one flatters threads that wait
    for one another.
    """
    work()
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
