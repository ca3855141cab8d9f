"""`python -m softmod.ui`: the dashboard of a local store."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from softmod import ui
from softmod.tracking import dashboard
from tests.reliability.test_tracking_faults import free_port
from tests.tracking.test_dashboard import Trained
from tests.tracking.test_uploader import database, here

__all__ = ["database", "here"]  # fixtures
ROOT = Path(__file__).parents[2]


def test_it_prints_the_address_and_starts_no_processes_for_jobs(here: Path) -> None:
    Trained("soft_modular", 0).evaluated(200, 1.0, 1.0).ended()
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (here / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "softmod.ui", f"port={port}"],
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,
        )
    try:
        end = time.monotonic() + 60.0
        answer = b""
        while answer != b"OK":
            assert time.monotonic() < end, (here / "log").read_text()
            time.sleep(0.2)
            with suppress(OSError):
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read()
        time.sleep(2.0)  # for whatever else it starts
        family = psutil.Process(server.pid).children(recursive=True)
        lines = [" ".join(process.cmdline()) for process in family]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert not [line for line in lines if "job" in line or "huey" in line]
    (number, _), *_ = dashboard.experiments(here / "mlflow.db")
    address = dashboard.address(f"sqlite:///{here / 'mlflow.db'}", number, port=port)
    assert f"toy: {address}\n" in (here / "log").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE alembic_version SET version_num = '451aebb31d03'", "mlflow db upgrade sqlite:///"),
        ("UPDATE alembic_version SET version_num = 'later'", "pip install --upgrade mlflow"),
        ("BEGIN EXCLUSIVE", "cannot be read (database is locked); end other programs"),
    ],
)
def test_a_store_that_the_server_refuses(
    here: Path, capsys: pytest.CaptureFixture[str], change: str, expected: str
) -> None:
    ui.check(here / "mlflow.db")
    with closing(sqlite3.connect(here / "mlflow.db", isolation_level=None)) as store:
        store.execute(change)
        assert ui.run([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"softmod: {here / 'mlflow.db'}: ")
    assert expected in error
    assert error.count("\n") == 1


def test_faulty_command_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, expected in (
        (["uri=http://me:hunter2@host"], "http://***@host"),
        (["port=0"], "port=0"),
        (["--port"], "--port: unknown flag"),
    ):
        assert ui.run(line) == 2
        assert expected in capsys.readouterr().err
    assert ui.addresses(here / "none.db", 5001) == [
        f"{here / 'none.db'}: no runs yet; the dashboard will be at http://127.0.0.1:5001"
    ]
