"""A learner with two workers that runs until it is killed; it prints the workers' pids."""

from __future__ import annotations

import time


def begin() -> None:
    from softmod.envs.toy import Toy
    from softmod.networks.mlp import MLP
    from softmod.networks.weights import flatten
    from softmod.workers.pool import Workers
    from softmod.workers.worker import Plan
    from tests.settings import network, published

    actor = published(MLP(9, 4, 2, 1, **network("mlp", num_layers=1, width=8)))
    with Workers(Plan(Toy(["toy-reach", "toy-touch"]), actor, 0), 2) as workers:
        workers.start(flatten(actor), 10)
        workers.finish()
        print(*(worker.process.pid for worker in workers.workers), flush=True)
        time.sleep(600)


if __name__ == "__main__":
    begin()
