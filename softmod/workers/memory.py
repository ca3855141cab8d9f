"""Memory that the learner and its workers share: the policy's weights."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from multiprocessing.heap import Arena

import numpy as np

from softmod.errors import WorkerError
from softmod.spec import Floats

AVOIDED = "workers.processes=0 (softmod.evaluate: processes=0) avoids this"


class SharedWeights:
    """An array of float32 that several processes see.

    The memory is anonymous where the system has that (Linux), and otherwise a file that is deleted
    at once in the temporary folder. It does not need `/dev/shm`, which is small in containers.

    Attributes:
        arena: the memory; picklable when a process is started.
        array: the weights `[number]`.

    Raises:
        WorkerError: there is not enough memory.
    """

    def __init__(self, number: int) -> None:
        size = max(1, 4 * number)
        try:
            descriptor = anonymous_memory(size)
            self.arena = Arena(size, descriptor)
        except OSError as error:
            reason = error.strerror or error
            raise WorkerError(
                f"no memory to share {size:,} bytes of weights with worker processes ({reason});"
                f" {AVOIDED}"
            ) from error
        weakref.finalize(self.arena, os.close, descriptor)
        self.array: Floats = weights_in(self.arena)[:number]


class PrivateWeights:
    """An array of float32 for this process alone.

    It begins at a page, as shared memory does, so that products round equally.

    Attributes:
        array: the weights `[number]`.
    """

    def __init__(self, number: int) -> None:
        self.array: Floats = np.frombuffer(mmap.mmap(-1, max(1, 4 * number)), np.float32, number)


def anonymous_memory(size: int) -> int:
    """Return the descriptor of zeroed memory of so many bytes.

    Raises:
        OSError: there is not enough.
    """
    try:
        descriptor = os.memfd_create("softmod-weights")
    except (AttributeError, OSError):  # not Linux, or refused in a sandbox
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)  # a full disk shows here, not when it is used
        else:
            os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def weights_in(arena: Arena) -> Floats:
    """Return the weights `[number]` in an arena, in any of the processes that share it."""
    weights: Floats = np.frombuffer(arena.buffer, np.float32, len(arena.buffer) // 4)
    return weights
