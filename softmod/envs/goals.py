"""Meta-World's benchmark goals as arrays: drawn once, kept on disk, equal to the
benchmarks' own.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from traceback import format_exception_only
from typing import Any
from zipfile import BadZipFile

import numpy as np

from softmod.envs.tasks import SETS
from softmod.errors import ConfigError, WorkerError
from softmod.spec import Goal
from softmod.system.files import atomic_write
from softmod.system.hardware import cache_folder

NUM_GOALS = 50
SECONDS_PER_TASK = 0.2  # roughly, on a 2.3 GHz core; only for the message

log = logging.getLogger(__name__)


def benchmark_goals(benchmark: str, seed: int) -> dict[str, Goal]:
    """The training goals of every task of `mt10`, `mt25` or `mt50`: task name to `[50, goal_dim]`
    float64, read-only.

    Equal to the goals in `metaworld.MT10(seed).train_tasks` and its like. Drawn once, then read
    from the cache folder. Raises ConfigError for a seed outside [0, 2**32).
    """
    path = cache_path(benchmark, seed)
    goals = _read(path, SETS[benchmark])
    if goals is None:
        goals = _generate(benchmark, seed)
        _write(path, goals)
    for array in goals.values():
        array.flags.writeable = False
    return goals


def environment_classes() -> dict[str, Any]:
    """Meta-World's environment classes by task name.

    Imports metaworld; WorkerError if mujoco cannot be imported.
    """
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    # mujoco loads the driver that MUJOCO_GL names, and raises what that happens to raise
    except Exception as error:
        chosen = os.environ.get("MUJOCO_GL")
        hint = f"; MUJOCO_GL is {chosen}, try without it" if chosen else ""
        raise WorkerError(f"Meta-World cannot be imported ({first_line(error)}){hint}") from error
    classes: dict[str, Any] = ALL_V3_ENVIRONMENTS
    return classes


def first_line(error: Exception) -> str:
    """An exception in one line of at most 160 characters."""
    return format_exception_only(error)[0].splitlines()[0][:160]


def cache_path(benchmark: str, seed: int) -> Path:
    """Return the path of a benchmark's cached goals."""
    return cache_folder() / f"goals-{benchmark}-seed{seed}-metaworld{version('metaworld')}.npz"


def draw(env: Any, rng: np.random.Generator | np.random.RandomState) -> Goal:
    """A goal `[goal_dim]` from the whole distribution of a Meta-World environment, drawn with `rng`
    alone.

    Resets the environment, since that is where Meta-World draws and where some tasks reject a draw.
    What is drawn does not depend on the simulation, so the hand is not moved: that is most of a
    reset's time.
    """
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    env.np_random = rng
    with _standing_still(env):
        env.reset()
    env._freeze_rand_vec = True
    return np.array(env._last_rand_vec, dtype=np.float64)


@contextmanager
def _standing_still(env: Any) -> Iterator[None]:
    """Resets of this environment leave out the 50 steps that move the hand; positions are still
    computed.
    """
    import mujoco

    def stand_still(steps: int = 0) -> None:
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center

    env._reset_hand = stand_still
    try:
        yield
    finally:
        del env._reset_hand


def _generate(benchmark: str, seed: int) -> dict[str, Goal]:
    """Draw as `metaworld.MT10(seed)` does: one stream, task after task, two draws a goal of which
    the last counts.
    """
    classes = environment_classes()
    tasks = SETS[benchmark]
    rng = _stream(seed)
    start = time.monotonic()
    _tell(
        f"Drawing the goals of {benchmark}'s {len(tasks)} tasks (once, about"
        f" {len(tasks) * SECONDS_PER_TASK:.0f} s)"
    )
    goals = {task: _task_goals(classes[task](), rng) for task in tasks}
    _tell(f"Drew the goals of {benchmark} in {time.monotonic() - start:.1f} s")
    return goals


def _stream(seed: int) -> np.random.RandomState:
    try:
        return np.random.RandomState(
            seed
        )  # the stream of np.random.seed(seed), without the global state
    except ValueError as error:
        raise ConfigError(
            f"env.goal_seed is {seed}, but has to lie between 0 and {2**32 - 1}"
        ) from error


def _task_goals(env: Any, rng: np.random.RandomState) -> Goal:
    goals = np.stack([draw(env, rng) for _ in range(NUM_GOALS)])  # [50, goal_dim]
    env.close()
    return goals


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read(path: Path, tasks: tuple[str, ...]) -> dict[str, Goal] | None:
    """The goals in a cache file; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            goals = {task: _valid(arrays[task]) for task in tasks}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        log.warning("The cached goals in %s cannot be read (%s): drawing them again", path, error)
        return None
    return goals


def _valid(goals: Goal) -> Goal:
    if (
        goals.ndim != 2
        or len(goals) != NUM_GOALS
        or goals.dtype != np.float64
        or not np.isfinite(goals).all()
    ):
        raise ValueError(
            f"an array of shape {goals.shape} and type {goals.dtype} is no task's goals"
        )
    return goals


def _write(path: Path, goals: dict[str, Goal]) -> None:
    try:
        with atomic_write(path) as beside, beside.open("wb") as file:
            np.savez(file, **goals)  # type: ignore[arg-type]
    except OSError as error:
        log.warning(
            "The goals cannot be kept in %s (%s): they are drawn again next time",
            path.parent,
            error,
        )
