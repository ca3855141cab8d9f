"""`python -m softmod.ui`: serve the dashboard of a local store, and print where to look.

It replaces itself with MLflow's server, without the processes for jobs, which keep a core busy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from softmod.command import tell
from softmod.config.compose import compose, typed
from softmod.config.schema import UiConfig
from softmod.errors import ConfigError, SoftmodError
from softmod.system.environment import of_children
from softmod.system.streams import exit_with, say
from softmod.tracking import dashboard
from softmod.tracking.mlflow_store import (
    SQLITE,
    database,
    follow_move,
    prepare_environment,
    store_uri,
)
from softmod.tracking.redact import redacted

MAX_LISTED = 10  # experiments
USAGE = """usage: python -m softmod.ui [KEY=VALUE ...]

  port=5000            port on this machine, 127.0.0.1
  uri=null             an SQLite store; null: MLFLOW_TRACKING_URI, or mlflow.db in this folder

Serves MLflow's dashboard and prints the address of each experiment's runs, the latest first."""


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Check the command line, print the addresses and become the server."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise ConfigError(f"{flags[0]}: unknown flag; see --help")
        cfg: UiConfig = typed(compose(arguments, "ui"))
        uri = store_uri(cfg.uri)
        path = database(uri)
        if path is None:
            raise ConfigError(
                f"uri={redacted(uri)}: a server has a dashboard of its own; this command serves"
                " SQLite files"
            )
        if path.exists():
            follow_move(path)
        for line in addresses(path, cfg.port):
            say(line)
        serve(path, cfg.port)
    except SoftmodError as error:
        return tell(error)


def addresses(store: Path, port: int) -> list[str]:
    """Return a line for each experiment of a store: its name, and the address of its runs."""
    found = dashboard.experiments(store)
    uri = f"{SQLITE}{store}"
    if not found:
        return [f"{store}: no runs yet; the dashboard will be at http://127.0.0.1:{port}"]
    lines = [
        f"{name}: {dashboard.address(uri, number, port=port)}"
        for number, name in found[:MAX_LISTED]
    ]
    more = len(found) - MAX_LISTED
    return [*lines, *([f"and {more} more experiments"] if more > 0 else [])]


def serve(store: Path, port: int) -> NoReturn:
    """Replace this process with MLflow's server on 127.0.0.1.

    Args:
        store: path of the SQLite file.
        port: port to listen at.
    """
    prepare_environment()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a dozen processes
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", f"{SQLITE}{store}"]
    os.execve(sys.executable, [sys.executable, *words], os.environ | of_children())


if __name__ == "__main__":
    main()
