"""A team's tracking server on PostgreSQL: jobs of a cluster log to it while it is killed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import SLURM, Folder, held_once, statuses
from tests.cluster.slurm import Slurm, until
from tests.cluster.team import Postgres, Server, missing

pytestmark = pytest.mark.cluster


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Start a database; skip the test where PostgreSQL is not installed."""
    if needed := missing():
        pytest.skip(needed)
    pytest.importorskip("psycopg2", reason="no psycopg2: pip install psycopg2-binary")
    with tempfile.TemporaryDirectory(prefix="postgres") as folder:
        Path(folder).chmod(0o755)
        with Postgres(Path(folder)) as started:
            yield started


@pytest.fixture
def server(postgres: Postgres, tmp_path: Path) -> Iterator[Server]:
    """Start an MLflow server on the database."""
    folder = tmp_path / "server"
    folder.mkdir()
    started = Server(folder, postgres.address)
    started.start()
    yield started
    started.kill()


@pytest.mark.case("six jobs, a server on PostgreSQL that is killed for 20 s: nothing lost or twice")
def test_six_jobs_and_a_server_that_is_killed(
    slurm: Slurm, postgres: Postgres, server: Server, tmp_path: Path, record_property
):
    environment = slurm.environment | {"MLFLOW_TRACKING_URI": server.uri}
    idle = server.cpu_seconds()
    folder = Folder(tmp_path / "jobs", environment)
    folder.path.mkdir()
    process = folder.train(*SLURM, "seed=0,1,2,3,4,5", "run.steps_per_task=4000")
    until(lambda: folder.sessions() >= 6 and folder.env_steps() > 600, 180)
    used = server.cpu_seconds() - idle
    server.kill()
    time.sleep(20)
    server.start()
    idle = server.cpu_seconds()
    assert slurm.ended(process, 600) == 0, folder.printed()
    used += server.cpu_seconds() - idle
    with postgres.connect() as store:
        assert statuses(store) == [(str(seed), "FINISHED") for seed in range(6)]
        values = held_once(folder, store)
    assert values > 600
    record_property("counted", f"6 runs, {values:,} values in the journals and in PostgreSQL")
    record_property("measured", f"{used:.0f} s of the server's processor time")
