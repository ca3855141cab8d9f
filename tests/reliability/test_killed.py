"""Bars 3, 4 and 6: a run killed at any moment, also within a save, resumes to the same end; each
metric is logged once.

The quick form dies within this process, at every point of a save. The full form (`make
test-reliability`) kills processes started by the command line, also at random moments, on
Meta-World too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from softmod import state
from softmod.agent.mtsac import MTSAC
from softmod.checkpoint.files import newest
from softmod.checkpoint.saver import Saver
from softmod.errors import SaveError
from softmod.system import faults
from softmod.tracking.metrics import Log
from softmod.workers.pool import Workers
from tests.command.test_signals import results
from tests.command.test_train import SMALL, here, only, run

__all__ = ["here"]

# and their turns: a save writes five groups of arrays, and one of the best weights writes one
POINTS = {
    "archive.written": (1, 3),
    "archive.renamed": (1, 4),
    "checkpoint.arrays": (1, 3, 7, 14),
    "checkpoint.written": (1, 2, 4, 6),
    "checkpoint.renamed": (1, 3, 5),
    "checkpoint.pruned": (1, 3),
}
QUICK = (
    "checkpoint.renamed",
    "archive.renamed",
)  # points whose every turn is tried in the quick tests
MOMENTS = [
    pytest.param(point, turn, marks=[pytest.mark.reliability] * (turn > 1 and point not in QUICK))
    for point, turns in POINTS.items()
    for turn in turns
]


class Killed(BaseException):
    """Stands for a kill within this process: code that catches exceptions does not clean up."""


def hashes(folder: Path) -> dict[str, str]:
    found = newest(folder)
    assert found is not None
    return state.state_hash(found[0])


def leftovers(folder: Path) -> list[str]:
    return [
        path.name
        for path in folder.rglob(".*")
        if path.name not in (".lock", ".uploaded", ".uploading")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        patch.setattr("sys.argv", ["softmod-train"])
        assert run() == 0
        folder = only(Path.cwd())
        return hashes(folder), results(folder)


@pytest.mark.bar(4)
@pytest.mark.bar(6)
@pytest.mark.parametrize(("point", "turn"), MOMENTS)
def test_killed_within_a_save(here, monkeypatch, undisturbed, point: str, turn: int):
    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "armed", f"{point}:{turn}")
        patch.setattr(faults, "_turns", {})
        patch.setattr(faults, "die", die)
        with pytest.raises(Killed):
            run()
    before = only(here)
    if turn > (5 if point == "checkpoint.arrays" else 1):
        assert newest(before) is not None  # always
    assert run() == 0
    assert (hashes(before), results(before)) == undisturbed
    assert leftovers(before) == []
    assert len(list((before / "checkpoints").iterdir())) == 3  # the last two, and the best weights


@pytest.mark.bar(4)
def test_killed_within_the_last_evaluation(here, monkeypatch, undisturbed):
    """Interrupt the last evaluation, which may take long: all training is on disk before it."""
    evaluate, learn, made = Workers.evaluate, MTSAC.learn, []

    def killed(workers: Workers, policy: Any, goals: int) -> Any:
        if goals == 4:
            raise Killed
        return evaluate(workers, policy, goals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "evaluate", killed)
        with pytest.raises(Killed):
            run()
    monkeypatch.setattr(
        MTSAC, "learn", lambda *args, **words: (made.append(1), learn(*args, **words))[1]
    )
    assert run() == 0
    assert made == []
    assert (hashes(only(here)), results(only(here))) == undisturbed


@pytest.mark.bar(4)
def test_killed_after_the_last_evaluation_where_the_clock_ended_the_run(here):
    """Repeat the evaluation only: no further round, and the same result."""
    words = ("run.max_minutes=0.0001", "run.eval_every=600")
    evaluation = Log.evaluation

    def killed(log: Log, *rest: Any) -> None:
        evaluation(log, *rest)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "evaluation", killed)
        with pytest.raises(Killed):
            run(*words)
    folder = only(here)
    before = results(folder)
    assert run(*words) == 0
    assert results(folder) == before
    assert json.loads((folder / "result.json").read_text())["env_steps"] == max(
        step for _, step in before
    )
    assert run("run.max_minutes=5") == 0  # goes on when given more
    assert json.loads((folder / "result.json").read_text())["env_steps"] == 600


@pytest.mark.bar(7)
def test_no_result_is_told_that_the_disk_does_not_hold(here, monkeypatch):
    save = Saver.save

    def refused(saver: Saver, clock: Any, *rest: Any) -> Path:
        if clock.env_steps == 600:
            raise SaveError("made up")
        return save(saver, clock, *rest)

    monkeypatch.setattr(Saver, "save", refused)
    assert run() == SaveError.exit_code
    assert max(step for name, step in results(only(here)) if name.startswith("eval/")) < 600


@pytest.mark.control(3)
@pytest.mark.control(4)
def test_seen_failing_a_replay_from_another_instant_is_found(here, monkeypatch, undisturbed):
    """Save a replay that is older than its model, as if both were written at different moments."""
    from softmod.checkpoint.replay_files import Archive

    save = Archive.save
    monkeypatch.setattr(
        Archive, "save", lambda self: dict(list(save(self).items())[:-1]) or save(self)
    )
    if (
        run("run.steps_per_task=60") == 4
    ):  # the piece that nobody named was pruned, and missed at the next save
        return
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.argv", ["softmod-train"])
    assert run() == 3 or hashes(only(here)) != undisturbed[0]


# --- the full form --------------------------------------------------------------------------------

METAWORLD = [
    "experiment=quickstart", "env.tasks=[reach-v3,push-v3]", "env.horizon=50",
    "run.max_minutes=null",
    "run.steps_per_task=6000", "run.warmup_per_task=100", "run.batch_per_task=16",
    "run.round_steps=10",
    "run.update_ratio=0.25", "run.eval_every=1000", "run.eval_goals=2", "run.final_eval_goals=2",
    "run.save_every=200",
    "run.log_every=100",
    "workers.processes=1", "fabric.threads=1",
]  # fmt: skip
CASES = {
    "toy": [
        *SMALL[:1],
        "workers.processes=2",
        *SMALL[2:],
        "run.steps_per_task=12000",
        "run.save_every=900",
        "run.eval_every=3000",
    ],
    "metaworld": METAWORLD,
}


def command(folder: Path, line: list[str], fault: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SOFTMOD_FAULT": fault,
    }
    log = (folder / "log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "softmod.train", *line],
        cwd=folder,
        env=environment,
        stdout=log,
        stderr=log,
    )


def finish(folder: Path, line: list[str], seed: int = 0) -> dict[str, str]:
    assert command(folder, line).wait(600) == 0, (folder / "log").read_text()[-2000:]
    return hashes(next(folder.glob(f"runs/*/seed_{seed}")))


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(runs, pids)):
        time.sleep(0.05)
    return not any(map(runs, pids))


def runs(pid: int) -> bool:
    """Return True if there is such a process and it has not ended; a zombie has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.bar(3)
@pytest.mark.reliability
@pytest.mark.parametrize("case", list(CASES))
def test_killed_twenty_times(case: str, tmp_path: Path, record_property: Any):
    """Kill at random moments and at points of a save, always in the session that follows the same
    first one.
    """
    line = [word for word in CASES[case] if word != "tracking=journal"] + [
        "tracking.drain_seconds=30"
    ]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = finish(tmp_path / "whole", line)
    draws = random.Random(0)
    moments = (
        [f"{point}:1" for point in POINTS]
        + ["upload.batch:1", "upload.batch:2"]
        + ["start-up"] * 3
        + ["training"] * 9
    )
    draws.shuffle(moments)
    killed = Counter[str]()
    for moment in moments:
        begun = metrics_lines(tmp_path / "killed")
        process = command(tmp_path / "killed", line, moment if ":" in moment else "")
        if not moment.startswith(("checkpoint", "archive")):
            while (
                moment != "start-up"
                and process.poll() is None
                and metrics_lines(tmp_path / "killed") == begun
            ):
                time.sleep(0.02)
            with suppress(subprocess.TimeoutExpired):
                process.wait(draws.uniform(0.0, 5.0 if moment == "start-up" else 1.0))
            if process.poll() is None:
                family = [
                    child.pid for child in psutil.Process(process.pid).children(recursive=True)
                ]
                os.kill(process.pid, signal.SIGKILL)
                assert gone(family)
        killed[moment.partition(".")[0]] += process.wait(120) == -signal.SIGKILL
    hashed = finish(tmp_path / "killed", line)
    assert killed.total() == len(moments), killed
    record_property(
        "tried",
        f"{case}: kill -9 " + ", ".join(f"{count} x {what}" for what, count in killed.items()),
    )
    assert hashed == expected
    folder = next((tmp_path / "killed").glob("runs/*/seed_0"))
    assert leftovers(folder) == []
    assert mlflow_holds_each_metric_once(tmp_path / "killed", folder)


def metrics_lines(root: Path) -> int:
    """Count the lines of metrics in the journals."""
    return sum(
        path.read_text().count('"kind":"metrics"')
        for path in root.glob("runs/*/seed_0/journal.jsonl")
    )


def mlflow_holds_each_metric_once(root: Path, folder: Path) -> bool:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (only_run,) = client.search_runs([experiment.experiment_id])
    journal: dict[str, set[int]] = {}
    for text in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(text)
        for name in entry.get("values", {}) if entry["kind"] == "metrics" else ():
            journal.setdefault(name, set()).add(entry["step"])
    for name, steps in journal.items():
        history = [metric.step for metric in client.get_metric_history(only_run.info.run_id, name)]
        assert sorted(history) == sorted(steps), name
    shutil.rmtree(root / "mlruns", ignore_errors=True)
    return only_run.info.status == "FINISHED"
