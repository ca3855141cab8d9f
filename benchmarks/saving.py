"""Time and size of checkpoints."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from softmod.agent.replay import Replay, random_rollout
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.saver import Saver
from softmod.clock import Clock
from softmod.config.compose import compose, typed
from softmod.envs.tasks import TOY_TASKS
from softmod.envs.toy import Toy
from softmod.experiment.build import make_agent, networks
from softmod.experiment.resources import fused, make_fabric
from softmod.networks.weights import flatten
from softmod.spec import EnvSpec
from softmod.tracking.console import Progress
from softmod.tracking.journal import Journal
from softmod.tracking.metrics import Log
from softmod.workers.pool import Workers
from softmod.workers.worker import Plan

ROUND = 1000  # steps


def measure(experiment: str, transitions: int, turns: int) -> list[dict[str, Any]]:
    """Measure the seconds that writing blocks the loop, the seconds to restore, and the size.

    The episodes in the checkpoint are of the toy tasks.
    """
    cfg = typed(compose([f"experiment={experiment}", "fabric=cpu"]))
    spec = EnvSpec(tuple(cfg.env.tasks), 39, 4, 500, cfg.env.train_horizon, 18)
    agent, optimizers = make_agent(cfg, spec, *networks(cfg, spec), make_fabric(cfg), fused(cfg))
    replay = Replay(spec, transitions // spec.num_tasks)
    for seed in range(replay.capacity // ROUND):
        replay.extend(random_rollout(spec, ROUND, seed=seed))
    suite, clock = Toy(TOY_TASKS), Clock()
    toy, _ = networks(cfg, suite.spec)
    write, read, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder, Workers(Plan(suite, toy, 0), 0) as workers:
        workers.start(flatten(toy), 1)
        workers.finish()
        log = Log(Journal(Path(folder)), spec, Progress(0), False)
        saver = Saver(Path(folder), agent, optimizers, replay, workers, {})
        for _ in range(turns):
            began = time.perf_counter()
            saved = saver.save(clock, log)
            write.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.restore(saved, checkpoint.verify(saved), clock)
            read.append(time.perf_counter() - began)
            size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
            clock.env_steps += 1
    return [
        {"what": "writing", "median": median(write), "unit": "s", "each": write},
        {"what": "restoring", "median": median(read), "unit": "s", "each": read},
        {"what": "size", "median": size / 2**20, "unit": "MiB", "each": []},
    ]
