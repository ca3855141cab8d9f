"""A working folder on the cluster: commands started in it, and what became of its runs."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

from softmod import state
from softmod.checkpoint.files import newest

LINE = [  # trains for about 20 seconds on a core
    "experiment=toy", "workers.processes=1", "fabric.threads=1", "env.horizon=20",
    "run.steps_per_task=6000", "run.warmup_per_task=40", "run.batch_per_task=8",
    "run.round_steps=10", "run.eval_every=3000", "run.eval_goals=2", "run.final_eval_goals=4",
    "run.save_every=900", "run.log_every=60", "tracking.system_metrics=false",
    "actor.module_width=8", "critic.module_width=8", "actor.embedding_width=8",
    "critic.embedding_width=8", "actor.gating_width=8", "critic.gating_width=8",
]  # fmt: skip
SLURM = [  # what a person types for this cluster
    "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2",
]  # fmt: skip
NO_PARENT = "p.run_uuid not in (select run_uuid from tags where key = 'softmod.sweep_id')"
Values = dict[tuple[str, str, int], set[float]]  # by seed, metric and step


class Folder:
    """A working folder, with the commands that are started in it."""

    def __init__(self, path: Path, environment: dict[str, str] | None = None):
        self.path = path
        own = {"PYTHONPATH": str(Path(__file__).parents[2]), "SOFTMOD_FAULT": ""}
        self.environment = (environment or dict(os.environ)) | own

    def train(self, *overrides: str) -> subprocess.Popen[bytes]:
        """Start a training command."""
        with (self.path / "log").open("ab") as log:
            return subprocess.Popen(
                self.command(*overrides),
                cwd=self.path,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def command(self, *overrides: str) -> list[str]:
        """Return a training command."""
        return [sys.executable, "-m", "softmod.train", *LINE, *overrides]

    def script(self, *overrides: str) -> str:
        """Return a training command as a line of a batch script."""
        lines = (f"export {name}={shlex.quote(self.environment[name])}" for name in ("PYTHONPATH",))
        return "\n".join([*lines, f"srun {shlex.join(self.command(*overrides))}"])

    def printed(self) -> str:
        """Return what the commands printed, and what the jobs did."""
        logs = [self.path / "log", *self.path.glob("slurm-*.out")]
        logs += self.path.glob("runs/.submitit/*/*_log.*")
        return "\n".join(log.read_text() for log in logs if log.exists())

    def runs(self) -> list[Path]:
        """Return the folders of the runs, by name."""
        return sorted(self.path.glob("runs/*/seed_*"))

    def hashes(self) -> dict[str, dict[str, str]]:
        """Return the hashes of each run's state, by the name of its folder (seed_0)."""
        return {run.name: state.state_hash(newest(run)[0]) for run in self.runs()}  # type: ignore[index]

    def env_steps(self) -> int:
        """Return the last env steps in the journals, over all runs."""
        return max((step for _, _, step in self.journaled()), default=0)

    def sessions(self) -> int:
        """Count the sessions of the runs."""
        journals = [run / "journal.jsonl" for run in self.runs()]
        return sum(journal.read_text().count('"kind":"session"') for journal in journals)

    def journaled(self) -> Values:
        """Return the values of each metric at each step in the journals, by the run's seed."""
        values: Values = {}
        for run in self.runs():
            for line in run.joinpath("journal.jsonl").read_text().splitlines():
                entry = json.loads(line)
                if entry["kind"] == "metrics":
                    for name, value in entry["values"].items():
                        key = (run.name.removeprefix("seed_"), name, entry["step"])
                        values.setdefault(key, set()).add(value)
        return values

    def database(self) -> AbstractContextManager[Any]:
        """Connect to mlflow.db."""
        return closing(sqlite3.connect(self.path / "mlflow.db"))

    def statuses(self) -> list[tuple[str, str]]:
        """Return seed and status of each run in mlflow.db, once there is one."""
        with suppress(sqlite3.OperationalError), self.database() as store:
            return statuses(store)
        return []


def statuses(store: Any) -> list[tuple[str, str]]:
    """Return seed and status of each run in a store of MLflow, without parents of sweeps."""
    rows = store.cursor()
    rows.execute(
        "select p.value, r.status from runs r join params p on p.run_uuid = r.run_uuid"
        f" where p.key = 'seed' and {NO_PARENT} order by p.value"
    )
    return [(str(seed), str(status)) for seed, status in rows.fetchall()]


def held_once(folder: Folder, store: Any) -> int:
    """Check that a store of MLflow holds each value of the journals, once; return their number."""
    rows = store.cursor()
    rows.execute(
        "select p.value, m.key, m.step, m.value from metrics m"
        f" join params p on p.run_uuid = m.run_uuid where p.key = 'seed' and {NO_PARENT}"
    )
    stored = [(key, value) for *key, value in rows.fetchall()]
    journaled = folder.journaled()
    assert sorted(tuple(key) for key, _ in stored) == sorted(journaled)
    assert all(value in journaled[tuple(key)] for key, value in stored)
    return len(stored)
