"""Workers need neither /dev/shm nor descriptors for their policies."""

from __future__ import annotations

import multiprocessing
import os
import tempfile

import numpy as np
import pytest

from softmod.errors import WorkerError
from softmod.workers import memory, process
from softmod.workers.memory import SharedWeights, weights_in


def write(arena) -> None:
    weights_in(arena)[:] = 7.0


@pytest.mark.parametrize("anonymous", [True, False])
def test_processes_see_the_same_weights(anonymous, monkeypatch):
    if not anonymous:
        monkeypatch.delattr(os, "memfd_create")
    shared = SharedWeights(1000)
    assert shared.array.shape == (1000,)
    assert not shared.array.any()
    child = multiprocessing.get_context("spawn").Process(target=write, args=(shared.arena,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.all(shared.array == 7.0)


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


def test_memory_is_anonymous_where_it_can_be():
    assert memory.anonymous_memory(4096) > 2
