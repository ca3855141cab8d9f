"""`python -m softmod.ui`: serve the dashboard of a local store, and print where to look.

It replaces itself with MLflow's server, without the processes for jobs, which keep a core busy.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from contextlib import closing
from importlib.util import find_spec
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
            check(path)
            follow_move(path)
        for line in addresses(path, cfg.port):
            say(line)
        serve(path, cfg.port)
    except SoftmodError as error:
        return tell(error)


def check(store: Path) -> None:
    """Refuse a store with which MLflow's server would end in a traceback.

    Raises:
        ConfigError: it cannot be read, or another version of MLflow made it.
    """
    try:
        with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", 2.0, uri=True)) as opened:
            row = opened.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        if "no such table" in str(error):  # a new file
            return
        raise ConfigError(
            f"{store}: cannot be read ({error}); end other programs that use it, or see whether it"
            " is an SQLite file"
        ) from error
    known, head = schemas()
    if not row or not known or row[0] == head:
        return
    if row[0] in known:
        todo = f"back it up, then type: mlflow db upgrade {SQLITE}{store}"
    else:
        todo = "type: pip install --upgrade mlflow"
    raise ConfigError(f"{store}: has the schema of another version of MLflow; {todo}")


def schemas() -> tuple[set[str], str]:
    """Return the database schemas that the installed MLflow knows, and the latest of them.

    They are read from its files, since importing them takes seconds.
    """
    found = find_spec("mlflow")
    folder = Path(found.origin if found and found.origin else "").parent / "store/db_migrations"
    links: dict[str, str] = {}  # schema to its predecessor
    for path in folder.glob("versions/*.py"):
        pairs = dict(
            re.findall(
                r"^(revision|down_revision)\b.*= \W?(\w+)", path.read_text(encoding="utf-8"), re.M
            )
        )
        if "revision" in pairs:
            links[pairs["revision"]] = pairs.get("down_revision", "")
    latest = links.keys() - links.values()
    return set(links), next(iter(latest), "")


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
