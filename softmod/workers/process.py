"""One worker: some of the environments, stepped in this process or in one of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from typing import Any

from softmod.errors import PhysicsError, WorkerError
from softmod.networks.weights import count
from softmod.spec import Floats
from softmod.system import signals
from softmod.workers.memory import SharedWeights
from softmod.workers.worker import Collector, Plan, describe, serve

LOOK = 0.2  # seconds between looks for a signal
SHUTDOWN = 2.0  # seconds that a worker may take to end
SOCKET_PATH = 107  # bytes of a socket's path, without the zero at its end
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
Request = tuple[Any, ...]  # a method's name and its arguments
NOTHING: Request = ("",)


class InlineWorker:
    """A worker in this process: asked now, computed when the answer is taken."""

    asked: Request

    def __init__(
        self, plan: Plan, tasks: list[int], copies: list[int], training: bool, weights: Floats
    ) -> None:
        self.tasks = tasks
        self.copies = copies
        try:
            self.collector = Collector(plan, tasks, copies, training, weights)
        except Exception as error:
            raise WorkerError(describe(error)) from error
        self.asked = NOTHING

    def wait_until_ready(self) -> None:
        """No-op."""

    def ask(self, method: str, *arguments: Any) -> None:
        self.asked = (method, *arguments)

    def answer(self, patience: float = 1.0, stoppable: bool = False) -> Any:
        method, *arguments = self.asked
        try:
            return getattr(self.collector, method)(*arguments)
        except PhysicsError:
            raise
        except Exception as error:
            raise WorkerError(describe(error)) from error

    def restarted(self) -> InlineWorker:
        """No-op: what fails in this process fails again."""
        return self

    def request_shutdown(self) -> None:
        """No-op."""

    def close(self, deadline: float = 0.0) -> None:
        self.collector.close()


class ProcessWorker:
    """A worker in a process of its own.

    Replies carry the number of their request, so that a stale one is never used.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: list[int],
        copies: list[int],
        training: bool,
        weights: SharedWeights,
        timeout: float,
    ) -> None:
        self.tasks = tasks
        self.copies = copies
        self.timeout = timeout
        self.arguments = (plan, tasks, copies, training, weights, timeout)
        # Plainly: PyTorch would share each tensor through a file in /dev/shm and a descriptor.
        try:
            packed = pickle.dumps(plan)
        except Exception as error:  # of the classes in it, which may raise anything
            kind = f"{type(plan.suite).__module__}.{type(plan.suite).__qualname__}"
            raise WorkerError(
                f"{kind} or a network cannot be sent to a worker process ({describe(error)});"
                " workers.processes=0 needs none"
            ) from error
        self.asked = NOTHING
        self.names = (
            ", ".join(plan.suite.spec.tasks[task] for task in tasks) + f" (seed {plan.seed})"
        )
        self.connection, theirs = multiprocessing.Pipe()
        limit(self.connection, timeout)
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(
            target=serve, args=(packed, tasks, copies, training, weights.arena, theirs), daemon=True
        )
        with without_main_module(plan):
            self.process.start()
        theirs.close()
        self.ready = False
        self.number = 0

    def ask(self, method: str, *arguments: Any) -> None:
        self.asked = (method, *arguments)
        self.wait_until_ready()
        self.number += 1
        try:
            self.connection.send((self.number, method, arguments))
        except BlockingIOError as error:
            raise WorkerError(self._silent(self.timeout)) from error
        except OSError as error:
            raise WorkerError(self._died()) from error

    def answer(self, patience: float = 1.0, stoppable: bool = False) -> Any:
        """Wait for the answer, for `patience` time-outs at most.

        Raises:
            WorkerError: the worker failed, died or did not answer in time.
            PhysicsError: the physics of an environment broke too often.
            StoppedError: a signal asked the run to stop, and the wait is `stoppable`.
        """
        number = -1
        while number != self.number:
            number, kind, payload = self._receive(patience, stoppable)
            if kind != "done":
                failure = PhysicsError if kind == "physics" else WorkerError
                raise failure(f"worker of {self.names}: {payload}")
        self.asked = NOTHING
        return payload

    def restarted(self) -> ProcessWorker:
        """Kill this process; return a worker of the same environments in a new one."""
        self.process.kill()
        self.close(0.0)
        return ProcessWorker(*self.arguments)

    def close(self, deadline: float | None = None) -> None:
        """Wait for the process to end; kill it after the deadline."""
        if deadline is None:
            deadline = time.monotonic() + SHUTDOWN
            self.request_shutdown()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()

    def wait_until_ready(self) -> None:
        """Wait until the environments are built, which happens while the learner is built."""
        if not self.ready:
            _, kind, payload = self._receive()
            if kind == "error":
                raise WorkerError(f"worker of {self.names} could not start: {payload}")
            self.ready = True

    def _receive(self, patience: float = 1.0, stoppable: bool = False) -> Any:
        allowed = patience * self.timeout
        deadline = time.monotonic() + allowed
        while True:
            if stoppable and signals.stopping():
                raise signals.StoppedError
            left = max(0.0, deadline - time.monotonic())
            ready = wait(
                [self.connection, self.process.sentinel], min(left, LOOK) if stoppable else left
            )
            if self.connection in ready:
                try:
                    return self.connection.recv()
                except BlockingIOError as error:
                    raise WorkerError(self._silent(self.timeout)) from error
                except (EOFError, OSError) as error:
                    raise WorkerError(self._died()) from error
            if ready:
                raise WorkerError(self._died())
            if time.monotonic() >= deadline:
                raise WorkerError(self._silent(allowed))

    def _silent(self, seconds: float) -> str:
        return f"worker of {self.names} did not answer within {seconds:g} s (workers.timeout)"

    def _died(self) -> str:
        self.process.join(1.0)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"worker of {self.names} (pid {self.process.pid}) died: {how}"

    def request_shutdown(self) -> None:
        try:
            self.connection.send((0, "close", ()))
        except OSError:
            pass


Worker = InlineWorker | ProcessWorker


@contextmanager
def without_main_module(plan: Plan) -> Iterator[None]:
    """Start a process within this without importing the program's main module again.

    A worker needs nothing of it, and a script that calls `softmod.train` outside of
    `if __name__ == "__main__":` would train once more in each worker. Only where the task set or a
    network is defined in the main module, the worker has to import it.
    """
    main = sys.modules["__main__"]
    needed = [type(plan.suite), *map(type, plan.actor.modules())]
    if any(kind.__module__ == "__main__" for kind in needed):
        yield
        return
    hidden = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update({"__spec__": None} | hidden)


def limit(connection: Connection, seconds: float) -> None:
    """Let a transfer fail with BlockingIOError where it stalls for so many seconds."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        span = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))  # C's timeval
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, direction, span)


def start_forkserver() -> None:
    """Start the process that workers are forked from: it has imported what they need, and has not
    computed.

    Signals are blocked in it: one that came while it imports would end it with a traceback.
    """
    forkserver.set_forkserver_preload(["softmod.workers.preload"])
    choose_short_temporary_folder()
    # Otherwise the next line starts it, and that unblocks SIGINT and SIGTERM.
    resource_tracker.ensure_running()
    with signals.kept_from_children():
        forkserver.ensure_running()


def choose_short_temporary_folder() -> None:
    """Let multiprocessing keep its socket in a folder with a short path.

    The path of a socket has at most 107 bytes. A temporary folder with a long path is common on
    clusters.
    """
    room = SOCKET_PATH - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) <= room:
        return
    writable = [folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    tempfile.tempdir = (writable or [before])[0]
    try:
        util.get_temp_dir()  # made, and kept for this process
    finally:
        tempfile.tempdir = before


def shared_weights(plan: Plan) -> SharedWeights:
    """Return memory for the actor's weights that processes can share."""
    return SharedWeights(count(plan.actor))


def start_worker(
    plan: Plan,
    tasks: list[int],
    copies: list[int],
    training: bool,
    timeout: float,
    inline: bool,
    shared: SharedWeights | None = None,
) -> Worker:
    """Start a worker of some environments, in this process or in one of its own; `shared` is the
    memory of the policy's weights.
    """
    shared = shared_weights(plan) if shared is None else shared
    if inline:
        return InlineWorker(plan, tasks, copies, training, shared.array)
    return ProcessWorker(plan, tasks, copies, training, shared, timeout)
