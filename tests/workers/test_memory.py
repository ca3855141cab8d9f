"""Workers need neither /dev/shm nor descriptors for their policies."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import tempfile

import numpy as np
import pytest
import torch

from softmod.envs.toy import Toy
from softmod.errors import WorkerError
from softmod.networks.gaussian import Actor
from softmod.networks.mlp import MLP
from softmod.networks.weights import flatten
from softmod.workers import memory, process
from softmod.workers.memory import SharedWeights, weights_in
from softmod.workers.pool import Workers
from softmod.workers.worker import Plan


def write(arena) -> None:
    weights_in(arena)[:] = 7.0


def refused(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("anonymous", ["there", "missing", "refused"])
def test_processes_see_the_same_weights(anonymous, monkeypatch):
    if anonymous == "missing":
        monkeypatch.delattr(os, "memfd_create")
    if anonymous == "refused":  # as in gVisor
        monkeypatch.setattr(os, "memfd_create", refused)
    shared = SharedWeights(1000)
    assert shared.array.shape == (1000,)
    assert not shared.array.any()
    child = multiprocessing.get_context("spawn").Process(target=write, args=(shared.arena,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.all(shared.array == 7.0)


def test_workers_in_this_process_need_no_shared_memory(monkeypatch):
    monkeypatch.setattr(memory, "anonymous_memory", refused)
    suite = Toy(("toy-reach",), horizon=20)
    network = MLP(suite.spec.obs_dim, 4, 1, num_layers=1, width=4, init="torch", norm="none")
    plan = Plan(suite, Actor(network, "clamp", False), seed=0)
    with pytest.raises(WorkerError, match="no memory to share"):
        Workers(plan, 1)
    with Workers(plan, 0) as workers:
        workers.start(flatten(plan.actor), 10)
        assert workers.finish().env_steps == 10
        assert workers.weights.ctypes.data % mmap.PAGESIZE == 0


def test_descriptors_are_given_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        SharedWeights(10)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_too_little_memory_is_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WorkerError, match=r"no memory to share 4,000 bytes.*workers.processes=0"):
        SharedWeights(1000)


def test_a_temporary_folder_with_a_long_path(tmp_path, monkeypatch):
    """A socket's path has at most 107 bytes."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    process.choose_short_temporary_folder()
    chosen = multiprocessing.util.get_temp_dir()
    assert len(os.fsencode(chosen)) < 60
    assert tempfile.gettempdir() == str(long)


def test_a_temporary_folder_with_a_short_path_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    process.choose_short_temporary_folder()
    assert multiprocessing.current_process()._config["tempdir"] is None


def test_a_policy_of_many_tensors_is_sent_without_shared_memory(monkeypatch):
    """PyTorch would open a descriptor and a file in /dev/shm for each of them."""

    def refuse(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    suite = Toy(("toy-reach",), horizon=20)
    spec = suite.spec
    network = MLP(spec.obs_dim, 2 * spec.action_dim, 1, num_layers=130, width=4, init="torch",
                  norm="none")  # fmt: skip
    deep = Plan(suite, Actor(network, "clamp", False), seed=0)
    assert len(list(network.parameters())) >= 260
    with Workers(deep, 1) as workers:
        workers.start(flatten(deep.actor), 10)
        assert workers.finish().env_steps == 10


def test_a_task_set_that_cannot_be_sent_is_named():
    suite = Toy(("toy-reach",), horizon=20)
    suite.mine = lambda: None  # type: ignore[attr-defined]
    network = MLP(suite.spec.obs_dim, 4, 1, num_layers=1, width=4, init="torch", norm="none")
    with pytest.raises(WorkerError, match=r"Toy or a network cannot be sent.*workers.processes=0"):
        Workers(Plan(suite, Actor(network, "clamp", False), seed=0), 1)
