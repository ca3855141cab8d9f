"""What a team runs for its dashboards: PostgreSQL, and an `mlflow server` on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from tests.cluster.slurm import INSTALL, free_ports, until

USER = "postgres"  # PostgreSQL refuses to run as root


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs; None if it is not installed."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "").parent]
    return next((place for place in places if (place / "initdb").exists()), None)


def missing() -> str | None:
    """Return what has to be installed for a team's server; None if all is there."""
    return f"no initdb: {INSTALL}" if binaries() is None else None


class Postgres:
    """A database of PostgreSQL in a folder, on a port of its own."""

    def __init__(self, folder: Path):
        programs = binaries()
        assert programs is not None
        self.programs = programs
        self.data = folder / "data"
        (self.port,) = free_ports(1)
        self.address = f"postgresql+psycopg2://{USER}@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Postgres:
        self.data.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self.data, USER)
        self._call("initdb", f"--username={USER}", "--auth=trust", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._call("pg_ctl", "start", "--wait", "-o", options, f"--log={self.data}/log")
        return self

    def __exit__(self, *error: object) -> None:
        self._call("pg_ctl", "stop", "--mode=immediate")

    def _call(self, program: str, *words: str) -> None:
        """Run a program of PostgreSQL, as its user where this is root."""
        user = USER if os.geteuid() == 0 else None
        command = [str(self.programs / program), f"--pgdata={self.data}", *words]
        done = subprocess.run(
            command,
            cwd="/",
            user=user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def connect(self) -> AbstractContextManager[Any]:
        """Connect to the database."""
        import psycopg2

        return closing(
            psycopg2.connect(host="127.0.0.1", port=self.port, user=USER, dbname="postgres")
        )


class Server:
    """An `mlflow server` on a database, as the documentation starts it."""

    def __init__(self, folder: Path, database: str):
        (self.port,) = free_ports(1)
        self.folder, self.database = folder, database
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        words = ["--backend-store-uri", self.database, "--artifacts-destination", "artifacts"]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "2"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._answers, 120)

    def _answers(self) -> bool:
        try:
            return bool(urlopen(f"{self.uri}/health", timeout=2).status == 200)
        except OSError:
            return False

    def cpu_seconds(self) -> float:
        """Return the processor time of the server and its workers since it was started."""
        top = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def kill(self) -> None:
        """Kill the server and its workers at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
