"""What a real SLURM does to runs: time limits, preemption, cancellation, a node that fails.

After each case, the run's state equals that of an undisturbed run, there is one MLflow run with
each value once, and its status is true.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Undisturbed
from tests.cluster.runs import SLURM, Folder, held_once, statuses
from tests.cluster.slurm import Slurm, until

pytestmark = pytest.mark.cluster

# SLURM looks at time limits twice a minute: a warning a minute before comes 30 to 60 seconds
# after the start, and a run of this length, a minute or more, is warned at least once.
LONGER = "run.steps_per_task=65000"


@pytest.fixture
def folder(tmp_path: Path, slurm: Slurm) -> Iterator[Folder]:
    """Return a working folder whose commands see the cluster, which is empty again afterwards."""
    yield Folder(tmp_path, slurm.environment)
    slurm.cancel_all()


def trains(folder: Folder, sessions: int = 1) -> None:
    """Wait until a run has logged metrics in this session of it."""
    reached = folder.env_steps() + 300
    until(lambda: folder.sessions() >= sessions and folder.env_steps() >= reached, 120)


def as_undisturbed(folder: Folder, hashes: dict[str, str], sessions: int) -> None:
    """Check that the run with seed 0 ended as an undisturbed one, after some sessions."""
    assert folder.hashes() == {"seed_0": hashes}, folder.printed()
    assert folder.sessions() >= sessions
    with folder.database() as store:
        assert statuses(store) == [("0", "FINISHED")]
        assert held_once(folder, store) > 100


@pytest.mark.case("time limit, a sweep by `hydra/launcher=slurm` (SIGUSR2)")
def test_time_limit_of_a_sweep(slurm: Slurm, folder: Folder, undisturbed: Undisturbed):
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60"]
    process = folder.train(*SLURM, "seed=0", *limit, LONGER)
    assert slurm.ended(process, 600) == 0, folder.printed()
    as_undisturbed(folder, undisturbed(LONGER), 2)


@pytest.mark.case("time limit, `sbatch --signal=USR1@60` with srun")
def test_time_limit_of_a_script(slurm: Slurm, folder: Folder, undisturbed: Undisturbed):
    words = ["--time=2", "--signal=USR1@60", "--requeue"]
    job = slurm.submit(folder.script(LONGER), folder.path, *words)
    ended = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=600)
    assert ended == "COMPLETED", folder.printed()
    assert slurm.restarts(job) >= 1
    as_undisturbed(folder, undisturbed(LONGER), 2)


@pytest.mark.parametrize(
    "partition",
    [
        pytest.param("low", marks=pytest.mark.case("preempted without a grace period")),
        pytest.param("grace", marks=pytest.mark.case("preempted with a grace period of a minute")),
    ],
)
def test_preemption(slurm: Slurm, folder: Folder, undisturbed: Undisturbed, partition: str):
    words = [f"--partition={partition}", "--nodelist=n1", "--requeue"]
    job = slurm.submit(folder.script(), folder.path, *words)
    trains(folder)
    slurm.preempt("n1")
    until(lambda: slurm.restarts(job) == 1, 60)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", folder.printed()
    as_undisturbed(folder, undisturbed(), 2)


@pytest.mark.case("preempted with a grace period, a sweep by `hydra/launcher=slurm`")
def test_preemption_of_a_sweep(slurm: Slurm, folder: Folder, undisturbed: Undisturbed):
    own = ["hydra.launcher.partition=grace", "+hydra.launcher.additional_parameters.nodelist=n1"]
    process = folder.train(*SLURM, "seed=0", *own)
    trains(folder)
    slurm.preempt("n1")
    assert slurm.ended(process) == 0, folder.printed()
    as_undisturbed(folder, undisturbed(), 2)


@pytest.mark.case("cancelled with scancel: saved, not queued again, KILLED, the command resumes")
def test_cancellation(slurm: Slurm, folder: Folder, undisturbed: Undisturbed):
    job = slurm.submit(folder.script(), folder.path, "--requeue")
    trains(folder)
    until(lambda: folder.statuses() == [("0", "RUNNING")], 60)
    slurm("scancel", job)
    assert slurm.wait_for(job, "CANCELLED", "PENDING", "RUNNING") == "CANCELLED"
    saved = folder.env_steps()
    until(lambda: folder.statuses() == [("0", "KILLED")], 60)
    job = slurm.submit(folder.script(), folder.path)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", folder.printed()
    assert saved > 0
    as_undisturbed(folder, undisturbed(), 2)


@pytest.mark.case("a node fails: the other one goes on")
def test_node_failure(slurm: Slurm, folder: Folder, undisturbed: Undisturbed):
    job = slurm.submit(folder.script(), folder.path, "--nodes=1", "--requeue")
    trains(folder)
    node = slurm.job(job)["NodeList"]
    slurm.fail(node)
    try:
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", folder.printed()
        assert slurm.job(job)["NodeList"] != node
    finally:
        slurm.start_node(node)
    as_undisturbed(folder, undisturbed(), 2)


@pytest.mark.case("SIGTERM or Ctrl-C to the command that waits: it names the jobs, which go on")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_waiting_command_is_stopped(
    slurm: Slurm, folder: Folder, undisturbed: Undisturbed, number: int, code: int
):
    process = folder.train(*SLURM, "seed=0")
    trains(folder)
    process.send_signal(number)
    assert process.wait(20) == code
    printed = (folder.path / "log").read_text()
    job = printed.partition("scancel ")[2].split()[0]
    assert f"1 job goes on ({job})" in printed
    assert "Traceback" not in printed
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", folder.printed()
    as_undisturbed(folder, undisturbed(), 1)


@pytest.mark.case("eight jobs over two nodes by the documented command, one node preempted")
def test_a_sweep_over_two_nodes(
    slurm: Slurm, folder: Folder, undisturbed: Undisturbed, record_property
):
    line = ["run.steps_per_task=2000", "run.round_steps=20"]
    process = folder.train(*SLURM, "seed=0,1,2,3,4,5,6,7", *line)
    began = time.monotonic()
    until(lambda: len(slurm("squeue", "--noheader", "--array").split("\n")) > 8, 60)
    record_property("measured", f"8 jobs queued after {time.monotonic() - began:.1f} s")
    until(lambda: folder.sessions() >= 4 and folder.env_steps() > 300, 120)
    slurm.preempt("n2")
    assert slurm.ended(process, 600) == 0, folder.printed()
    assert folder.sessions() > 8
    assert folder.hashes()["seed_0"] == undisturbed(*line)
    assert folder.hashes()["seed_7"] == undisturbed(*line, "seed=7")
    assert "Set tracking.uri to the address of a server" in (folder.path / "log").read_text()
    with folder.database() as store:
        assert statuses(store) == [(str(seed), "FINISHED") for seed in range(8)]
        assert held_once(folder, store) > 800
        parents = store.execute(
            "select distinct value from tags where key = 'mlflow.parentRunId'"
        ).fetchall()
    assert len(parents) == 1


@pytest.mark.case("a job on the CPU of a node with a GPU: a warning says what to set")
@pytest.mark.parametrize("words", [(), ("--gpus-per-node=1",)])
def test_a_gpu_that_is_not_used(slurm: Slurm, folder: Folder, words: tuple[str, ...]):
    script = folder.script("run.steps_per_task=100", "tracking=journal")
    job = slurm.submit(script, folder.path, "--nodelist=n2", *words)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", folder.printed()
    given = "SLURM gave it GPU 0" if words else "its node n2 has gpu:1"
    assert f"warning: this job trains on the CPU, but {given}" in folder.printed()


@pytest.mark.case("a partition that does not exist: one line, exit 2")
def test_a_refused_submission(slurm: Slurm, folder: Folder):
    process = folder.train(*SLURM, "seed=0", "hydra.launcher.partition=nope", "tracking=journal")
    assert process.wait(60) == 2
    *_, line = (folder.path / "log").read_text().splitlines()  # after those of sbatch
    assert line.startswith(
        "softmod: SLURM does not take the jobs: sbatch: error: invalid partition"
    )
