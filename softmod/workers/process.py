"""One worker, which steps some of the environments in this process or in one of its own."""

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
from multiprocessing.process import BaseProcess
from typing import Any

from softmod.errors import PhysicsError, WorkerError
from softmod.networks.weights import count
from softmod.spec import Floats
from softmod.system import environment, signals
from softmod.workers.memory import AVOIDED, PrivateWeights, SharedWeights
from softmod.workers.worker import Collector, Plan, describe, serve

POLL = 0.2  # seconds between checks for a signal
SHUTDOWN = 2.0  # seconds for a worker to end
SOCKET_PATH = 107  # bytes of a socket's path, without the zero at its end
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
Request = tuple[Any, ...]  # a method's name and its arguments
NO_REQUEST: Request = ("",)


class InlineWorker:
    """A worker in this process; it computes a reply only when the reply is read."""

    request: Request  # the pending request

    def __init__(
        self, plan: Plan, tasks: list[int], copies: list[int], training: bool, weights: Floats
    ) -> None:
        self.tasks = tasks
        self.copies = copies
        try:
            self.collector = Collector(plan, tasks, copies, training, weights)
        except Exception as error:
            raise WorkerError(describe(error)) from error
        self.request = NO_REQUEST

    def wait_until_ready(self) -> None:
        """No-op."""

    def ask(self, method: str, *arguments: Any) -> None:
        """Store a request: a method of the collector and its arguments."""
        self.request = (method, *arguments)

    def answer(self, timeouts: float = 1.0, stoppable: bool = False) -> Any:
        """Compute and return the reply to the request.

        Raises:
            WorkerError: the request failed.
            PhysicsError: the simulation failed too often.
        """
        method, *arguments = self.request
        try:
            return getattr(self.collector, method)(*arguments)
        except PhysicsError:
            raise
        except Exception as error:
            raise WorkerError(describe(error)) from error

    def restarted(self) -> InlineWorker:
        """No-op, since a failure in this process would only repeat."""
        return self

    def request_shutdown(self) -> None:
        """No-op."""

    def close(self, deadline: float = 0.0) -> None:
        """Close the environments."""
        self.collector.close()


class ProcessWorker:
    """A worker in a process of its own.

    Replies carry the number of their request, so stale replies are discarded.
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
        if not may_start_processes():
            raise WorkerError(
                "a process of multiprocessing.Pool may not start worker processes; set"
                " workers.processes=0, or use concurrent.futures.ProcessPoolExecutor"
            )
        # Plain pickle: PyTorch's would share each tensor through a file in /dev/shm.
        try:
            packed = pickle.dumps(plan)
        except Exception as error:  # of the classes in it, which may raise anything
            kind = f"{type(plan.suite).__module__}.{type(plan.suite).__qualname__}"
            raise WorkerError(
                f"{kind} or a network cannot be sent to a worker process ({describe(error)});"
                f" {AVOIDED}"
            ) from error
        self.request = NO_REQUEST
        names = ", ".join(plan.suite.spec.tasks[task] for task in tasks)
        self.names = f"{names} (seed {plan.seed})"
        self.imports_main = needs_main_module(plan)
        arguments = (packed, tasks, copies, training, weights.arena)
        try:
            self.connection, self.process = self._started(arguments)
        except (OSError, EOFError) as error:  # no process left, or no socket in the folder for it
            raise WorkerError(f"no process can be started ({error}); {AVOIDED}") from error
        self.ready = False
        self.number = 0

    def _started(self, arguments: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
        """Start the process; return the connection to it, and the process."""
        connection, remote = multiprocessing.Pipe()
        limit(connection, self.timeout)
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=serve, args=(*arguments, remote), daemon=True)
        # Ctrl-C waits until all arguments are sent: half of them end the worker with a traceback.
        with without_main_module(self.imports_main), signals.deferred_interrupt():
            process.start()
        remote.close()
        return connection, process

    def ask(self, method: str, *arguments: Any) -> None:
        """Send a request: a method of the collector and its arguments.

        Raises:
            WorkerError: the worker died or does not receive in time.
        """
        self.request = (method, *arguments)
        self.wait_until_ready()
        self.number += 1
        try:
            self.connection.send((self.number, method, arguments))
        except BlockingIOError as error:
            raise WorkerError(self._timed_out(self.timeout)) from error
        except OSError as error:
            raise WorkerError(self._died()) from error

    def answer(self, timeouts: float = 1.0, stoppable: bool = False) -> Any:
        """Wait for the reply to the request and return it.

        Args:
            timeouts: the time limit, in units of `timeout`.
            stoppable: stop waiting on a signal.

        Raises:
            WorkerError: the worker failed, died or did not reply in time.
            PhysicsError: the simulation of an environment failed too often.
            StoppedError: a signal stopped the run, and the wait is `stoppable`.
        """
        number = -1
        while number != self.number:
            number, kind, payload = self._receive(timeouts, stoppable)
            if kind != "done":
                failure = PhysicsError if kind == "physics" else WorkerError
                raise failure(f"worker of {self.names}: {payload}")
        self.request = NO_REQUEST
        return payload

    def restarted(self) -> ProcessWorker:
        """Kill this process; return a new worker with the same environments."""
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
        """Wait until the environments are built, in parallel with the learner.

        Raises:
            WorkerError: they could not be built.
        """
        if not self.ready:
            _, kind, payload = self._receive()
            if kind == "error":
                raise WorkerError(f"worker of {self.names} could not start: {payload}")
            self.ready = True

    def _receive(self, timeouts: float = 1.0, stoppable: bool = False) -> Any:
        """Return the next message `(number, kind, payload)` of the worker."""
        allowed = timeouts * self.timeout
        deadline = time.monotonic() + allowed
        while True:
            if stoppable and signals.stopping():
                raise signals.StoppedError
            remaining = max(0.0, deadline - time.monotonic())
            patience = min(remaining, POLL) if stoppable else remaining
            ready = wait([self.connection, self.process.sentinel], patience)
            if self.connection in ready:
                try:
                    return self.connection.recv()
                except BlockingIOError as error:
                    raise WorkerError(self._timed_out(self.timeout)) from error
                except (EOFError, OSError) as error:
                    raise WorkerError(self._died()) from error
            if ready:
                raise WorkerError(self._died())
            if time.monotonic() >= deadline:
                raise WorkerError(self._timed_out(allowed))

    def _timed_out(self, seconds: float) -> str:
        return f"worker of {self.names} did not answer within {seconds:g} s (workers.timeout)"

    def _died(self) -> str:
        self.process.join(1.0)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if self.imports_main and not self.ready and code == 1:
            how += '; workers import the script, which needs `if __name__ == "__main__":`'
        return f"worker of {self.names} (pid {self.process.pid}) died: {how}"

    def request_shutdown(self) -> None:
        """Ask the process to close its environments and end."""
        try:
            self.connection.send((0, "close", ()))
        except OSError:
            pass


Worker = InlineWorker | ProcessWorker


def may_start_processes() -> bool:
    """Return whether this process may have children; those of `multiprocessing.Pool` may not."""
    return not multiprocessing.current_process().daemon


def needs_main_module(plan: Plan) -> bool:
    """Return whether the program's main module defines the task set or a network.

    Raises:
        WorkerError: it does, and cannot be imported, as in a notebook.
    """
    for kind in (type(plan.suite), *map(type, plan.actor.modules())):
        if kind.__module__ == "__main__":
            main = sys.modules["__main__"]
            file = getattr(main, "__file__", None) or ""
            if getattr(main, "__spec__", None) is None and not os.path.isfile(file):
                raise WorkerError(
                    f"worker processes cannot import {kind.__name__}, which is not defined in a"
                    f" file; move it to a module of its own, or: {AVOIDED}"
                )
            return True
    return False


@contextmanager
def without_main_module(imported: bool) -> Iterator[None]:
    """Start a process within this that does not import the program's main module again.

    Otherwise a script that calls `softmod.train` outside of `if __name__ == "__main__":` would
    train again in each worker. With `imported`, a no-op.
    """
    main = sys.modules["__main__"]
    if imported:
        yield
        return
    hidden = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update({"__spec__": None} | hidden)


def limit(connection: Connection, seconds: float) -> None:
    """Make transfers that stall for `seconds` fail with BlockingIOError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, timeval)


def start_forkserver() -> None:
    """Start the process that workers are forked from, with their imports preloaded.

    Signals are blocked in it, since a signal during an import would end it with a traceback.
    """
    forkserver.set_forkserver_preload(["softmod.workers.preload"])
    choose_short_temporary_folder()
    with environment.changed(environment.of_children()):
        # Otherwise the next call starts the tracker, which unblocks SIGINT and SIGTERM.
        resource_tracker.ensure_running()
        with signals.kept_from_children():
            forkserver.ensure_running()


def _forget_forkserver() -> None:
    """Let a forked process start another one, since it cannot wait for that of its parent."""
    server: Any = forkserver._forkserver
    server._forkserver_pid = None


os.register_at_fork(after_in_child=_forget_forkserver)


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


def private_weights(plan: Plan) -> PrivateWeights:
    """Return memory for the actor's weights in this process alone."""
    return PrivateWeights(count(plan.actor))


def start_worker(
    plan: Plan,
    tasks: list[int],
    copies: list[int],
    training: bool,
    timeout: float,
    inline: bool,
    memory: SharedWeights | PrivateWeights | None = None,
) -> Worker:
    """Start a worker with some environments.

    Args:
        plan: the task set, the policy and the run's seed.
        tasks, copies: the worker's environments are `tasks x copies`.
        training: whether to build training environments.
        timeout: seconds for a reply.
        inline: step in this process instead of a new one.
        memory: of the policy's weights (`shared_weights`, or `private_weights` if inline); None:
            new memory.
    """
    if inline:
        memory = memory or private_weights(plan)
        return InlineWorker(plan, tasks, copies, training, memory.array)
    shared = memory if isinstance(memory, SharedWeights) else shared_weights(plan)
    return ProcessWorker(plan, tasks, copies, training, shared, timeout)
