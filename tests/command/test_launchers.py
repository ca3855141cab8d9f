"""Jobs of a sweep in other processes: equal results, one parent, exit codes of failures."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softmod.tracking.names import WALL_CLOCK
from tests.command.test_train import SMALL, here, run
from tests.reliability.test_files import trained
from tests.reliability.test_killed import command

__all__ = ["here"]

SWEEP = ("-m", "seed=0,1", "tracking=mlflow")
LAUNCHERS = ("joblib", pytest.param("submitit_local", marks=pytest.mark.reliability))


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is true of a command that goes on."""
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


def results(folder: Path) -> dict[tuple[str, str, int], Any]:
    """Return all metrics of all runs below a folder, except those that depend on the wall clock."""
    found = {}
    for journal in folder.glob("runs/*/*/journal.jsonl"):
        for line in map(json.loads, journal.read_text().splitlines()):
            if line["kind"] == "metrics":
                for name, value in line["values"].items():
                    if not name.startswith(WALL_CLOCK):
                        found[journal.parent.name, name, line["step"]] = value
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_gives_equal_results_under_one_parent(
    here: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
):
    (here / "one").mkdir()
    (here / "other").mkdir()
    monkeypatch.chdir(here / "one")
    assert run(*SWEEP) == 0
    assert trained(here / "other", *SWEEP, f"hydra/launcher={launcher}").returncode == 0
    assert results(here / "one") == results(here / "other")
    assert len({seed for seed, _, _ in results(here / "other")}) == 2
    with sqlite3.connect(here / "other" / "mlflow.db") as store:
        runs = store.execute("select status from runs").fetchall()
        parents = store.execute(
            "select distinct value from tags where key = 'mlflow.parentRunId'"
        ).fetchall()
    assert runs == [("FINISHED",)] * 3
    assert len(parents) == 1


@pytest.mark.reliability
@pytest.mark.bar(20)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failure_elsewhere_is_the_command_s(here: Path, launcher: str):
    (here / "runs").write_text("in the way")  # no job can create its run folder
    ended = trained(here, "-m", "seed=0,1", f"hydra/launcher={launcher}")
    assert ended.returncode == 2, ended.stderr
    assert not list(here.glob(".softmod-failed*"))


@pytest.mark.bar(9)
def test_a_stop_reaches_the_processes_of_a_launcher(here: Path):
    """SIGTERM to the command alone: its jobs save, later ones do not start, and they resume."""
    line = ["-m", "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    line += ["run.steps_per_task=100000"]
    process = command(here, [*SMALL, *line])

    def both_saved() -> bool:
        return len({path.parts[-3] for path in here.glob("runs/*/*/checkpoints/step_*")}) == 2

    wait_until(both_saved, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (here / "log").read_text()
    printed = (here / "log").read_text()
    assert "softmod: stopped; the same command resumes the runs" in printed
    assert "Traceback" not in printed
    journals = here.glob("runs/*/*/journal.jsonl")
    ends = [journal.read_text().splitlines()[-1] for journal in journals]
    assert [json.loads(end)["status"] for end in ends] == ["KILLED"] * 2


def test_a_mistyped_launcher_is_answered_with_the_nearest(here: Path, capsys):
    assert run("-m", "seed=0,1", "hydra/launcher=slurn") == 2
    assert "hydra/launcher=slurn: hydra/launcher has no option slurn" in (
        printed := capsys.readouterr().err
    )
    assert "did you mean slurm?" in printed
