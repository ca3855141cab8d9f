"""Environment steps per second: ours, Meta-World's vector environments, EnvPool, physics alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.pairing import Figure, Rate, alternate
from softmod.config.compose import compose, typed
from softmod.envs.metaworld import MetaWorld
from softmod.envs.tasks import SETS
from softmod.experiment.build import networks
from softmod.networks.weights import flatten
from softmod.workers.pool import Workers
from softmod.workers.worker import Plan

ACTING = "ours, {0} workers, acting"
STEPPING = "ours, {0} workers, actions handed in"
PHYSICS = "physics alone, {0} processes"
GYM = "gym.make_vec, {0}"
ENVPOOL = "EnvPool, {0} processes"
FRAME_SKIP = 5
# steps every environment this many times; returns the seconds to subtract, such as those of resets
Stepper = Callable[[int], float]


def measure(benchmark: str, cores: int, seconds: float, turns: int) -> list[Figure]:
    """Measure all contenders on a benchmark's tasks, with one environment per task.

    All contenders exist during all turns.
    """
    tasks = SETS[benchmark]
    with ExitStack() as stack:
        rates: dict[str, Rate] = {}
        for processes in range(1, cores + 1):
            rates[ACTING.format(processes)] = partial(
                stack.enter_context(Acting(tasks, processes)).rate, seconds
            )
            for name, make in ((STEPPING, ours), (PHYSICS, physics)):
                crew = stack.enter_context(Crew(make, tasks, processes))
                rates[name.format(processes)] = partial(crew.rate, seconds)
        for strategy in ("sync", "async"):
            envs = vector(benchmark, strategy)
            stack.callback(envs.close)
            rates[GYM.format(strategy)] = partial(
                timed, partial(step_vector, envs), len(tasks), seconds
            )
        if has_envpool():
            crew = stack.enter_context(Crew(envpool, tasks, cores))
            rates[ENVPOOL.format(cores)] = partial(crew.rate, seconds)
        return alternate(rates, "env steps/s", turns)


def growth(benchmarks: tuple[str, ...], cores: int, seconds: float, turns: int) -> list[Figure]:
    """Measure acting workers on several task sets."""
    with ExitStack() as stack:
        crews = {name: stack.enter_context(Acting(SETS[name], cores)) for name in benchmarks}
        return alternate(
            {name: partial(crew.rate, seconds) for name, crew in crews.items()},
            "env steps/s",
            turns,
        )


def timed(steps: Stepper, environments: int, seconds: float, chunk: int = 10) -> float:
    """Return steps per second over all environments, measured for at least `seconds`."""
    done, began, aside = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
        aside += steps(chunk)
        done += chunk * environments
    return done / (time.perf_counter() - began - aside)


# --- ours, acting ---------------------------------------------------------------------------------


class Acting:
    """Workers that act with the paper's shallow actor in rounds of 50 steps, as in training."""

    def __init__(self, tasks: tuple[str, ...], processes: int) -> None:
        cfg = typed(compose(["experiment=paper_mt10", f"env.tasks=[{','.join(tasks)}]"]))
        suite = MetaWorld(tasks)
        actor, _ = networks(cfg, suite.spec)
        self.weights = flatten(actor)
        self.workers = Workers(Plan(suite, actor, 0), processes)

    def rate(self, seconds: float) -> float:
        """Return env steps per second, measured for at least `seconds`."""
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            self.workers.start(self.weights, 50)
            done += self.workers.finish().env_steps
        return done / (time.perf_counter() - began)

    def __enter__(self) -> Acting:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()


# --- actions handed in ----------------------------------------------------------------------------


class Crew:
    """Processes that step their part of the tasks on request, all at the same time."""

    def __init__(
        self, make: Callable[[list[str]], Stepper], tasks: tuple[str, ...], processes: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.members = [], []
        for worker in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(make, list(tasks[worker::processes]), theirs), daemon=True
            )
            process.start()
            self.connections.append(mine)
            self.members.append(process)
        for connection in self.connections:
            connection.recv()

    def rate(self, seconds: float) -> float:
        """Return env steps per second, measured for at least `seconds`."""
        self._signal(signal.SIGCONT)
        for connection in self.connections:
            connection.send(seconds)
        total = float(sum(connection.recv() for connection in self.connections))
        self._signal(signal.SIGSTOP)  # threads that spin while waiting would disturb other turns
        return total

    def _signal(self, number: int) -> None:
        """Send a signal to all processes."""
        for process in self.members:
            os.kill(process.pid or 0, number)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in zip(self.connections, self.members, strict=True):
            connection.close()
            process.kill()
            process.join()


def serve(make: Callable[[list[str]], Stepper], tasks: list[str], connection: Connection) -> None:
    """Run a process of a crew: receive seconds, send the rate, until the pipe closes."""
    steps = make(tasks)
    connection.send("ready")
    while True:
        try:
            seconds = connection.recv()
        except EOFError:
            return
        connection.send(timed(steps, len(tasks), seconds))


def actions(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield random actions `[count, 4]` forever, from a block drawn beforehand."""
    block = np.random.default_rng(0).uniform(-1, 1, (500, count, 4)).astype(np.float32)
    while True:
        yield from block


def ours(tasks: list[str]) -> Stepper:
    """Return a stepper of our environments."""
    suite = MetaWorld(tasks)
    return step_slots(suite)


def step_slots(suite: MetaWorld) -> Stepper:
    """Return a stepper of a suite's environments, reset to the next goal at the horizon.

    The time of resets, which is mostly physics, does not count.
    """
    envs = [suite.make(index) for index in range(suite.spec.num_tasks)]
    draws, count = actions(len(envs)), 0

    def steps(number: int) -> float:
        nonlocal count
        aside = 0.0
        for _ in range(number):
            if count % suite.spec.horizon == 0:
                aside -= time.perf_counter()
                for index, env in enumerate(envs):
                    env.reset(suite.goals(index)[count // suite.spec.horizon % 50])
                aside += time.perf_counter()
            for env, action in zip(envs, next(draws), strict=True):
                env.step(action)
            count += 1
        return aside

    return steps


def physics(tasks: list[str]) -> Stepper:
    """Return a stepper of the physics alone: MuJoCo's five substeps and its forward pass.

    The hand moves at random. This is the lower bound of a step's time.
    """
    import mujoco

    suite = MetaWorld(tasks)
    envs = [suite.make(index) for index in range(len(tasks))]
    for index, env in enumerate(envs):
        env.reset(suite.goals(index)[0])
    raw = [env._env.unwrapped for env in envs]
    states = [(env.model, env.data, env.mocap_low, env.mocap_high) for env in raw]
    draws = actions(len(tasks))

    def steps(number: int) -> float:
        for _ in range(number):
            for (model, data, low, high), action in zip(states, next(draws), strict=True):
                data.mocap_pos[0] = np.minimum(
                    np.maximum(data.mocap_pos[0] + action[:3] * 0.01, low), high
                )
                data.ctrl[:] = (action[3], -action[3])
                mujoco.mj_step(model, data, nstep=FRAME_SKIP)
                mujoco.mj_forward(model, data)
        return 0.0

    return steps


def vector(benchmark: str, strategy: str) -> Any:
    """Make Meta-World's vector environment."""
    import gymnasium
    import metaworld  # noqa: F401  (registers its environments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = gymnasium.make_vec(
            f"Meta-World/{benchmark.upper()}", vector_strategy=strategy, seed=0
        )
    envs.reset()
    return envs


def step_vector(envs: Any, number: int) -> float:
    """Step a vector environment with random actions; no time is subtracted."""
    for action in (envs.action_space.sample() for _ in range(number)):
        envs.step(action)
    return 0.0


def has_envpool() -> bool:
    """Return whether EnvPool is installed."""
    try:
        import envpool  # noqa: F401
    except ImportError:
        return False
    return True


def envpool(tasks: list[str]) -> Stepper:
    """Return a stepper of EnvPool's C++ port, which is pinned to Meta-World 3.0.0.

    Each task has a pool of one environment with one thread.
    """
    import envpool

    name = {
        task: "MetaWorld/" + "".join(word.title() for word in task[:-3].split("-")) + "-v3"
        for task in tasks
    }
    pools = [
        envpool.make(name[task], env_type="gymnasium", num_envs=1, num_threads=1) for task in tasks
    ]
    for pool in pools:
        pool.reset()
    draws = actions(len(tasks))

    def steps(number: int) -> float:
        for _ in range(number):
            for pool, action in zip(pools, next(draws), strict=True):
                pool.step(action[None].astype(np.float64))
        return 0.0

    return steps
