"""Environment steps per second: ours, Meta-World's own vector environments, EnvPool's, and physics
alone.
"""

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
Stepper = Callable[
    [int], float
]  # makes so many steps of every environment; seconds of them that do not count


def measure(benchmark: str, cores: int, seconds: float, turns: int) -> list[Figure]:
    """Rates on one benchmark's tasks, one environment each; every contender lives through all
    turns.
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
    """Rates of workers that act, on several sets of tasks."""
    with ExitStack() as stack:
        crews = {name: stack.enter_context(Acting(SETS[name], cores)) for name in benchmarks}
        return alternate(
            {name: partial(crew.rate, seconds) for name, crew in crews.items()},
            "env steps/s",
            turns,
        )


def timed(steps: Stepper, environments: int, seconds: float, chunk: int = 10) -> float:
    """Steps per second over all environments, for at least this long."""
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
    """Processes that each step their share of the tasks when told to, all at the same time."""

    def __init__(
        self, make: Callable[[list[str]], Stepper], tasks: tuple[str, ...], processes: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.members = [], []
        for share in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(make, list(tasks[share::processes]), theirs), daemon=True
            )
            process.start()
            self.connections.append(mine)
            self.members.append(process)
        for connection in self.connections:
            connection.recv()

    def rate(self, seconds: float) -> float:
        self._signal(signal.SIGCONT)
        for connection in self.connections:
            connection.send(seconds)
        total = float(sum(connection.recv() for connection in self.connections))
        self._signal(
            signal.SIGSTOP
        )  # threads that wait by spinning would disturb the others' turns
        return total

    def _signal(self, number: int) -> None:
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
    steps = make(tasks)
    connection.send("ready")
    while True:
        try:
            seconds = connection.recv()
        except EOFError:
            return
        connection.send(timed(steps, len(tasks), seconds))


def actions(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Random actions `[count, 4]` for ever, from a block made beforehand."""
    block = np.random.default_rng(0).uniform(-1, 1, (500, count, 4)).astype(np.float32)
    while True:
        yield from block


def ours(tasks: list[str]) -> Stepper:
    suite = MetaWorld(tasks)
    return step_slots(suite)


def step_slots(suite: MetaWorld) -> Stepper:
    """Our environments, reset at the horizon to the next goal; resets, mostly physics themselves,
    do not count.
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
    """What nothing can do without: MuJoCo's five substeps and its forward pass, the hand moved at
    random.
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
    for action in (envs.action_space.sample() for _ in range(number)):
        envs.step(action)
    return 0.0


def has_envpool() -> bool:
    try:
        import envpool  # noqa: F401
    except ImportError:
        return False
    return True


def envpool(tasks: list[str]) -> Stepper:
    """EnvPool's C++ port (pinned to Meta-World 3.0.0), a pool of one environment and one thread per
    task.
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
