"""Choice of worker processes and learner threads, measured once per machine and cached.

Bitwise reproducibility needs the same numbers again: a resumed run keeps its own, and a repeated
run finds the same choice in the cache.
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

from softmod.system.files import atomic_write
from softmod.system.hardware import available, processor

log = logging.getLogger(__name__)
RULE = 4  # version of the selection rule; a new number invalidates cached choices
MEASURED_ROUNDS = 4
MEASURED_TASKS = 3  # enough for a mean, quick to build


@dataclass(frozen=True)
class Chosen:
    """Number of worker processes (0: inline) and of learner threads."""

    processes: int
    threads: int

    def in_turns(self, cores: int = 0) -> bool:
        """Return whether workers collect before the learner learns, rather than meanwhile.

        The threads of an update synchronize at every operation. If one of them shared its core with
        a worker, all of them would wait.

        Args:
            cores: 0 for all cores that this process may use.
        """
        several = self.processes > 0 and self.threads > 1
        return several and self.processes + self.threads > (cores or available())


@dataclass(frozen=True)
class Costs:
    """Measured seconds of one update, by number of threads, and of one env step in a worker."""

    update: Mapping[int, float]
    step: float


@dataclass(frozen=True)
class Round:
    """Work of a round.

    Attributes:
        updates: updates of the learner.
        env_steps: training steps of all environments.
        environments: environments that worker processes can share.
        evaluated: evaluation steps per round, on average; the learner idles during these.
    """

    updates: float
    env_steps: int
    environments: int
    evaluated: float = 0.0


def thread_counts(cores: int = 0) -> list[int]:
    """Return the thread counts to measure: the powers of two up to `cores`, and `cores`.

    Args:
        cores: 0 for all cores that this process may use.
    """
    cores = cores or available()
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def best(
    costs: Costs,
    wanted: Round,
    processes: int | None = None,
    threads: int | None = None,
    cores: int = 0,
) -> Chosen:
    """Return the choice with the shortest round; ties go to fewer threads, then fewer processes.

    Args:
        costs: measured seconds.
        wanted: work of a round.
        processes: fixes the number of worker processes; None: choose it.
        threads: fixes the number of threads; None: choose it.
        cores: 0 for all cores that this process may use.
    """
    cores = cores or available()
    most = max(1, min(cores, wanted.environments))
    process_counts = range(1, most + 1) if processes is None else [processes]
    counts = [threads] if threads else [count for count in costs.update if count <= cores]

    def rank(choice: Chosen) -> tuple[float, int, int]:
        estimate = round(seconds(costs, wanted, choice, cores), 6)
        return estimate, choice.threads, choice.processes

    return min((Chosen(p, t) for p in process_counts for t in counts), key=rank)


def seconds(costs: Costs, wanted: Round, choice: Chosen, cores: int) -> float:
    """Estimate the seconds of a round and its share of an evaluation.

    If workers and learner take turns, a round takes the sum of collecting and learning. If they
    overlap and there are enough cores, it takes the longer of the two. If there are too few, they
    share the cores fairly until the shorter one is done.
    """
    learn = wanted.updates * costs.update[choice.threads]
    if not choice.processes:
        return learn + (wanted.env_steps + wanted.evaluated) * costs.step
    collect = wanted.env_steps * costs.step / choice.processes
    evaluate = wanted.evaluated * costs.step / choice.processes
    if choice.in_turns(cores):
        return learn + collect * max(1.0, choice.processes / cores) + evaluate
    speed = min(1.0, cores / (choice.processes + choice.threads))  # of each, while all of them run
    shorter, longer = sorted((learn, collect))
    return shorter / speed + (longer - shorter) + evaluate


# --- cache ----------------------------------------------------------------------------------------


def cached_choice(
    folder: Path,
    settings: Mapping[str, Any],
    measure: Callable[[], Costs],
    choose: Callable[[Costs], Chosen],
) -> Chosen:
    """Return the cached choice for these settings on this machine; measure and cache it if missing.

    Args:
        folder: the cache folder.
        settings: all that the choice depends on besides the machine, as JSON values.
        measure: measures the costs.
        choose: makes the choice from the costs.
    """
    identity = {
        "rule": RULE,
        "machine": [platform.node(), platform.machine(), processor(), available()],
        **settings,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"cores-{key}.json"
    try:
        return Chosen(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        chosen = choose(measure())
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(chosen)), encoding="utf-8")
    except OSError as error:
        log.warning(
            "%s: worker processes and threads cannot be cached (%s); measured again next time",
            folder,
            error,
        )
    return chosen


def timed(work: Callable[[], object], least: float = 0.5) -> float:
    """Return the median seconds of repeated calls, after one warm-up call.

    The minimum would underestimate calls whose threads wait for one another.

    Args:
        work: the function to time.
        least: minimum seconds to measure for.
    """
    work()
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
