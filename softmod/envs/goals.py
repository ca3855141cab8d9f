"""Meta-World's benchmark goals as arrays, drawn once and cached on disk."""

from __future__ import annotations

import logging
import os
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
from softmod.system import environment
from softmod.system.files import atomic_write
from softmod.system.streams import complain
from softmod.system.user import cache_folder

NUM_GOALS = 50
SECONDS_PER_TASK = 0.2  # on a 2.3 GHz core, roughly; only for the progress message

log = logging.getLogger(__name__)


def benchmark_goals(benchmark: str, seed: int) -> dict[str, Goal]:
    """Return the training goals of every task of a benchmark.

    They equal those of `metaworld.MT10(seed).train_tasks` and its counterparts. They are drawn
    once, then read from the cache folder.

    Args:
        benchmark: `mt10`, `mt25` or `mt50`.
        seed: the benchmark's seed.

    Returns:
        Task name to goals `[50, goal_dim]`, float64, read-only.

    Raises:
        ConfigError: the seed is outside [0, 2**32).
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
    """Import metaworld; return its environment classes by task name.

    mujoco loads the driver named by MUJOCO_GL, which only videos need. If it cannot be loaded, only
    they fail.

    Raises:
        WorkerError: metaworld or mujoco cannot be imported.
    """
    try:
        return _import_classes()
    except Exception as error:  # of the driver, which may raise any
        if not os.environ.get("MUJOCO_GL"):
            raise WorkerError(f"Meta-World cannot be imported ({first_line(error)})") from error
    try:
        with environment.changed({"MUJOCO_GL": "disable"}):
            return _import_classes()
    except Exception as error:
        raise WorkerError(f"Meta-World cannot be imported ({first_line(error)})") from error


def _import_classes() -> dict[str, Any]:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    classes: dict[str, Any] = ALL_V3_ENVIRONMENTS
    return classes


def first_line(error: Exception) -> str:
    """Return an exception as one line of at most 160 characters."""
    return format_exception_only(error)[0].splitlines()[0][:160]


def cache_path(benchmark: str, seed: int) -> Path:
    """Return the path of a benchmark's cached goals."""
    return cache_folder() / f"goals-{benchmark}-seed{seed}-metaworld{version('metaworld')}.npz"


def draw(env: Any, rng: np.random.Generator | np.random.RandomState) -> Goal:
    """Draw a goal `[goal_dim]` from an environment's whole distribution, using `rng` only.

    This resets the environment, since Meta-World draws goals in its reset, where some tasks reject
    draws. The goal does not depend on the simulation, so the reset does not move the hand, which
    would take most of its time.
    """
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    env.np_random = rng
    with _hand_at_rest(env):
        env.reset()
    env._freeze_rand_vec = True
    return np.array(env._last_rand_vec, dtype=np.float64)


@contextmanager
def _hand_at_rest(env: Any) -> Iterator[None]:
    """Skip the 50 steps of a reset that move the hand; positions are still computed."""
    import mujoco

    def reset_hand(steps: int = 0) -> None:
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center

    env._reset_hand = reset_hand
    try:
        yield
    finally:
        del env._reset_hand


def _generate(benchmark: str, seed: int) -> dict[str, Goal]:
    """Draw goals as `metaworld.MT10(seed)` does: task after task, from one stream.

    Each goal takes two draws, of which the second is used.
    """
    classes = environment_classes()
    tasks = SETS[benchmark]
    rng = _stream(seed)
    start = time.monotonic()
    complain(
        f"Drawing the goals of {benchmark}'s {len(tasks)} tasks (once, about"
        f" {len(tasks) * SECONDS_PER_TASK:.0f} s)"
    )
    goals = {task: _task_goals(classes[task](), rng) for task in tasks}
    complain(f"Drew the goals of {benchmark} in {time.monotonic() - start:.1f} s")
    return goals


def _stream(seed: int) -> np.random.RandomState:
    """Return the stream of `np.random.seed(seed)`, without the global state."""
    try:
        return np.random.RandomState(seed)
    except ValueError as error:
        raise ConfigError(
            f"env.goal_seed is {seed}, but must be between 0 and {2**32 - 1}"
        ) from error


def _task_goals(env: Any, rng: np.random.RandomState) -> Goal:
    goals = np.stack([draw(env, rng) for _ in range(NUM_GOALS)])  # [50, goal_dim]
    env.close()
    return goals


def _read(path: Path, tasks: tuple[str, ...]) -> dict[str, Goal] | None:
    """Return the goals in a cache file; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            goals = {task: _valid(arrays[task]) for task in tasks}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        log.warning("the cached goals in %s cannot be read (%s); drawing them again", path, error)
        return None
    return goals


def _valid(goals: Goal) -> Goal:
    if (
        goals.ndim != 2
        or len(goals) != NUM_GOALS
        or goals.dtype != np.float64
        or not np.isfinite(goals).all()
    ):
        raise ValueError(f"shape {goals.shape} and dtype {goals.dtype} are invalid for goals")
    return goals


def _write(path: Path, goals: dict[str, Goal]) -> None:
    try:
        with atomic_write(path) as beside, beside.open("wb") as file:
            np.savez(file, **goals)  # type: ignore[arg-type]
    except OSError as error:
        log.warning(
            "the goals cannot be kept in %s (%s); they will be drawn again next time",
            path.parent,
            error,
        )
