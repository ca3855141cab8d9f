"""Bars 1, 2, 9, 11 to 13 and 24 in full: whole runs by the command line, stopped, killed, or left
alone for long.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from softmod.system import signals
from softmod.workers.pool import Workers
from softmod.workers.process import ProcessWorker
from tests.command.test_train import SMALL
from tests.reliability.test_killed import CASES, METAWORLD, command, finish, gone, hashes, leftovers
from tests.workers.test_workers import plan, rounds, same, weights

pytestmark = pytest.mark.reliability
TOY = [word for word in CASES["toy"] if not word.startswith(("tracking", "workers"))] + [
    "tracking=journal"
]
QUIET = [*METAWORLD, "tracking=journal"]
ONCE = [
    "env._target_=tests.faulty.Once",
]  # an environment that fails once in a whole run


def folder_of(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


def run_of(folder: Path) -> Path:
    return next(folder.glob("runs/*/seed_*"))


def sessions(folder: Path) -> int:
    """Count the processes that have trained the run so far."""
    return sum(
        path.read_text().count('"kind":"session"')
        for path in folder.glob("runs/*/seed_0/journal.jsonl")
    )


def wait_for_step(
    folder: Path, process: subprocess.Popen[bytes], earlier: int = 0, seconds: float = 60.0
) -> None:
    """Wait until the given session of the run has started and its journal has metrics."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        journals = folder.glob("runs/*/seed_0/journal.jsonl")
        if sessions(folder) > earlier and any('"metrics"' in path.read_text() for path in journals):
            return
        time.sleep(0.02)


# --- 1: equal runs --------------------------------------------------------------------------------


@pytest.mark.bar(1)
@pytest.mark.parametrize("case", ["toy", "Meta-World"])
def test_two_runs_with_one_configuration_have_equal_hashes(case, tmp_path, record_property):
    line = [*(TOY if case == "toy" else QUIET), "run.steps_per_task=400"]
    tried = []
    for processes in (0, 1, 2):
        words = [*line, f"workers.processes={processes}"]
        one, other = (
            finish(folder_of(tmp_path, f"{name}{processes}"), words) for name in ("one", "other")
        )
        assert one == other
        tried.append(one)
    seed = finish(folder_of(tmp_path, "seed"), [*line, "workers.processes=1", "seed=1"], seed=1)
    assert seed["state"] != tried[1]["state"]
    equal = len({hashed["state"] for hashed in tried})
    record_property(
        "tried",
        f"{case}: 2 runs each with 0, 1, 2 workers ({equal} different hashes), one of another seed",
    )


# --- 2 and 9: told to stop ------------------------------------------------------------------------


@pytest.mark.bar(2)
@pytest.mark.bar(9)
@pytest.mark.parametrize("case", ["toy", "Meta-World"])
def test_stopped_at_random_moments(case, tmp_path, record_property):
    """Send every signal in turn, one of them twice: each session saves and ends with 143."""
    line = [*(TOY if case == "toy" else QUIET), "workers.processes=1"]
    expected = finish(folder_of(tmp_path, "whole"), line)
    folder, draws = folder_of(tmp_path, "stopped"), random.Random(1)
    codes, slowest = [], 0.0
    for number in range(8):
        earlier = sessions(folder)
        process = command(folder, line)
        wait_for_step(folder, process, earlier)
        time.sleep(draws.uniform(0.0, 1.5))
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        asked = time.monotonic()
        for _ in range(1 + (number == 3)):
            process.send_signal(signals.STOPS[number % len(signals.STOPS)])
        codes.append(process.wait(30))
        slowest = max(slowest, time.monotonic() - asked)
        assert gone(family)
        if codes[-1] == 0:
            break
    assert slowest < 10.0
    assert codes.count(143) >= 4, codes
    assert set(codes) <= {0, 143}
    assert finish(folder, line) == expected
    assert leftovers(run_of(folder)) == []
    record_property(
        "tried",
        f"{case}: {codes.count(143)} sessions stopped, the slowest in {slowest:.1f} s, equal hash",
    )


@pytest.mark.bar(9)
def test_a_warned_job_asks_once(tmp_path, monkeypatch, record_property):
    scontrol, calls = tmp_path / "scontrol", tmp_path / "calls"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = folder_of(tmp_path, "job")
    process = command(folder, [*TOY, "workers.processes=1"])
    wait_for_step(folder, process)
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 143
    assert calls.read_text() == "requeue 7\n"
    record_property("tried", "3 warnings to one SLURM job: requeued once")


DEAF = """
import contextlib, sys
from softmod import train
from softmod.system import signals
signals.handled = contextlib.nullcontext
train.main()
"""


@pytest.mark.control(2)
@pytest.mark.control(9)
def test_without_handlers_a_stopped_run_saves_nothing(tmp_path):
    folder = folder_of(tmp_path, "deaf")
    line = [*TOY, "workers.processes=1", "run.save_every=100000", "run.eval_every=100000"]
    process = script(folder, DEAF, line)
    wait_for_step(folder, process)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    assert not list(folder.glob("runs/*/seed_0/checkpoints/step_*"))


def script(folder: Path, code: str, line: list[str]) -> subprocess.Popen[bytes]:
    """Run the command with something patched."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    log = (folder / "log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-c", code, *line], cwd=folder, env=environment, stdout=log, stderr=log
    )


# --- 11 and 12: workers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return finish(tmp_path_factory.mktemp("undisturbed"), [*TOY, "workers.processes=3"])


@pytest.mark.bar(11)
@pytest.mark.parametrize("fault", ["build", "raise-307", "die-307", "hang-307"])
def test_a_worker_that_fails_is_replaced_and_the_run_is_the_same(
    fault, tmp_path, undisturbed, record_property
):
    line = [*TOY, "workers.processes=3", *ONCE, f"env.name={fault}"]
    assert (
        finish(tmp_path, [*line, "workers.timeout=4" if "hang" in fault else "workers.timeout=60"])
        == undisturbed
    )
    told = (tmp_path / "log").read_text()
    assert "worker of toy-opposite (seed 0)" in told
    assert "a new one takes over (1 of 3)" in told
    record_property("tried", f"{fault}: equal hash")


@pytest.mark.bar(11)
def test_three_workers_killed_from_outside(tmp_path, undisturbed, record_property):
    """Replace them within seconds; the message names the tasks, the seed and the signal."""
    line, draws = [*TOY, "workers.processes=3"], random.Random(2)
    process = command(tmp_path, line)
    wait_for_step(tmp_path, process)
    for number in range(1, 4):
        time.sleep(draws.uniform(0.1, 0.5))
        worker = draws.choice(workers_of(process.pid))
        worker.kill()
        killed = time.monotonic()
        while f"a new one takes over ({number} of 3)" not in (tmp_path / "log").read_text():
            assert time.monotonic() - killed < 10
            assert process.poll() is None, "over before it could be killed"
            time.sleep(0.02)
    assert process.wait(120) == 0
    assert hashes(run_of(tmp_path)) == undisturbed
    told = (tmp_path / "log").read_text()
    assert told.count("(seed 0)") == told.count("died: signal 9") == 3
    record_property("tried", "3 SIGKILLs from outside: equal hash")


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the processes that step environments: children of the forking process."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.ppid() != pid and not child.children()]


@pytest.mark.control(11)
def test_a_replacement_that_is_not_brought_to_where_the_other_was(monkeypatch):
    with Workers(plan(), 0) as workers:
        expected = rounds(workers, 3)
    ask = ProcessWorker.ask

    def careless(self, method, *arguments):
        ask(self, *(("collect", 1) if method == "restore" else (method, *arguments)))

    monkeypatch.setattr(ProcessWorker, "ask", careless)
    with Workers(plan(), 3) as workers:
        for theirs in expected[:2]:
            workers.start(weights(), 10)
            same(workers.finish(), theirs)
        workers.workers[1].process.kill()
        workers.workers[1].process.join()
        workers.start(weights(), 10)
        with pytest.raises(AssertionError):
            same(workers.finish(), expected[2])


@pytest.mark.timed
@pytest.mark.bar(12)
def test_a_stopped_worker_is_replaced_at_its_time_out(tmp_path, undisturbed, record_property):
    """Stop it with SIGSTOP: it neither dies nor responds, and would respond later."""
    process = command(tmp_path, [*TOY, "workers.processes=3", "workers.timeout=3"])
    wait_for_step(tmp_path, process)
    worker = workers_of(process.pid)[0]
    worker.suspend()
    stopped = time.monotonic()
    while "did not answer within 3 s" not in (tmp_path / "log").read_text():
        assert time.monotonic() - stopped < 10
        time.sleep(0.02)
    took = time.monotonic() - stopped
    assert took < 3.0 + 2.0
    assert process.wait(120) == 0
    assert hashes(run_of(tmp_path)) == undisturbed
    assert gone([worker.pid])
    record_property("tried", f"SIGSTOP, time-out 3 s: replaced after {took:.1f} s, equal hash")


def stale_and_due(workers: Workers) -> tuple[np.ndarray, np.ndarray]:
    """Send a worker two requests, discard the first response, and return the next one with the
    expected one.
    """
    workers.start(weights(), 10)
    for worker in workers.workers:
        worker.ask("collect", 10)  # the first answer lies in the pipe when this one is waited for
    return workers.workers[0].answer().obs, expected_second()


def expected_second() -> np.ndarray:
    with Workers(plan(), 0) as workers:
        return rounds(workers, 2)[1].obs


@pytest.mark.bar(12)
def test_a_stale_reply_is_never_used():
    with Workers(plan(), 1) as workers:
        given, due = stale_and_due(workers)
    np.testing.assert_allclose(given, due, atol=1e-5)


@pytest.mark.control(12)
def test_replies_without_numbers_are_stale(monkeypatch):
    receive = ProcessWorker._receive

    def careless(self, *arguments):
        return self.number, *receive(self, *arguments)[1:]

    monkeypatch.setattr(ProcessWorker, "_receive", careless)
    with Workers(plan(), 1) as workers:
        given, due = stale_and_due(workers)
    assert np.abs(given - due).max() > 1e-2


# --- 13: the learner is killed --------------------------------------------------------------------


def shared_memory() -> set[str]:
    """Return the names of shared memory. Folders belong to MLflow servers of other tests."""
    return {entry.name for entry in os.scandir("/dev/shm") if not entry.is_dir()}


def killed_learner(folder: Path, line: list[str], seconds: float) -> list[int]:
    """Return the descendants at that moment."""
    process = command(folder, line)
    wait_for_step(folder, process)
    time.sleep(seconds)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    return family


@pytest.mark.bar(13)
def test_nothing_outlives_a_killed_learner(tmp_path, record_property):
    before, draws = shared_memory(), random.Random(3)
    slowest, families = 0.0, 0
    for number in range(10):
        family = killed_learner(
            folder_of(tmp_path, str(number)), [*TOY, "workers.processes=2"], draws.uniform(0.0, 1.0)
        )
        killed = time.monotonic()
        assert gone(family)
        slowest, families = max(slowest, time.monotonic() - killed), families + len(family)
    assert slowest < 2.0
    assert shared_memory() == before
    assert families >= 30
    record_property(
        "tried", f"10 learners killed, {families} descendants gone within {slowest:.1f} s"
    )


@pytest.mark.control(13)
def test_a_worker_that_does_not_look_outlives_it(tmp_path):
    line = [
        *TOY,
        "workers.processes=3",
        "env._target_=tests.faulty.Orphan",
        "env.name=hang-307",
    ]
    family = killed_learner(tmp_path, line, 2.0)
    try:
        assert not gone(family)
    finally:
        for pid in family:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


# --- 24: for long ---------------------------------------------------------------------------------


def watched(folder: Path, line: list[str]) -> list[tuple[int, float, int, int, int]]:
    """Sample a whole run: env steps, and MiB, files, threads and number of all its processes."""
    process, seen = command(folder, line), []
    while process.poll() is None:
        journals = "".join(path.read_text() for path in folder.glob("runs/*/seed_0/journal.jsonl"))
        steps = max(map(int, re.findall(r'"step":\s*(\d+)', journals)), default=0)
        try:
            family = [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]
            memory = sum(member.memory_full_info().uss for member in family) / 2**20
            files, threads = sum(m.num_fds() for m in family), sum(m.num_threads() for m in family)
            seen.append((steps, memory, files, threads, len(family)))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.5)
    assert process.returncode == 0, (folder / "log").read_text()[-2000:]
    return [entry for entry in seen if 0 < entry[0] < seen[-1][0]]  # before the end is begun


def slope(seen: list[tuple[int, float, int, int, int]]) -> float:
    """Return the growth in MiB per 10,000 env steps, after the first fifth."""
    late = [entry for entry in seen if entry[0] > seen[-1][0] / 5]
    steps, memory = (np.array([entry[i] for entry in late], float) for i in (0, 1))
    return float(np.polyfit(steps, memory, 1)[0] * 10_000)


LONG = [
    *SMALL[:1], "tracking=journal", "fabric.threads=1", "workers.processes=1", *SMALL[4:],
    "run.steps_per_task=33400", "run.update_ratio=0.6", "run.save_every=2000",
    "run.eval_every=10000",
    "run.log_every=600", "run.replay_per_task=2000",
]  # fmt: skip


@pytest.mark.bar(24)
def test_a_long_run_stays_as_it_is(tmp_path, record_property):
    seen = watched(tmp_path, LONG)
    late = [entry for entry in seen if entry[0] > seen[-1][0] / 5]
    growth = slope(seen)
    assert seen[-1][0] >= 95_000
    assert growth < 1.0
    for i, what in ((2, "files"), (3, "threads"), (4, "processes")):
        counts = [entry[i] for entry in late]
        assert max(counts) - min(counts) <= (2 if what == "files" else 0), (
            what
        )  # a checkpoint is being written
    record_property(
        "tried",
        f"{seen[-1][0]:,} env steps: {growth:+.2f} MiB per 10,000, {late[-1][3]} threads"
        " throughout",
    )


@pytest.mark.control(24)
def test_a_leak_is_seen(tmp_path):
    leaky = [
        "env._target_=tests.faulty.Leaky",
        "run.steps_per_task=8000",
        "run.update_ratio=0.1",
    ]
    assert slope(watched(tmp_path, [*LONG, *leaky])) > 1.0
