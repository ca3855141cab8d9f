"""Bars 8 and 16 in full: what a save costs with a million transitions and more, and the replay
against a list.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod.agent.replay import Replay, bytes_per_transition, random_rollout
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.replay_files import Archive
from tests.agent.test_replay import agree
from tests.stream import FRAMES, Stream

ROOT = Path(__file__).parents[2]

# --- 8: what a save costs -------------------------------------------------------------------------

MEASURE = """
import json, sys
from tests.reliability.test_saving import costs
print(json.dumps(costs(int(sys.argv[1]), int(sys.argv[2]), restore=True)))
"""


def measured(rows: int, new: int, script: str = MEASURE) -> dict[str, float]:
    """Return what `costs` measures in a separate process, where only the saver allocates memory."""
    line = [sys.executable, "-c", script, str(rows), str(new)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        line, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def costs(rows: int, new: int, restore: bool) -> dict[str, float]:
    """Measure bytes, seconds and memory of saving MT10's agent and `rows` transitions per task.

    The first save writes all of them; the second and third write `new` ones per task.
    """
    from softmod.checkpoint.saver import Saver
    from softmod.clock import Clock
    from softmod.config.compose import compose, typed
    from softmod.envs.toy import Toy
    from softmod.experiment.build import make_agent, networks
    from softmod.experiment.resources import fused, make_fabric
    from softmod.spec import EnvSpec
    from softmod.tracking.console import Progress
    from softmod.tracking.journal import Journal
    from softmod.tracking.metrics import Log
    from softmod.workers.pool import Workers
    from softmod.workers.worker import Plan

    cfg = typed(compose(["experiment=paper_mt10", "fabric=cpu", f"run.replay_per_task={rows}"]))
    spec = EnvSpec(tuple(cfg.env.tasks), 39, 4, 500, None, 18)
    agent, optimizers = make_agent(cfg, spec, *networks(cfg, spec), make_fabric(cfg), fused(cfg))
    replay, clock, suite = Replay(spec, rows), Clock(), Toy(["toy-reach"])
    fill(replay, rows)
    agent.learn(replay, 1)
    with (
        tempfile.TemporaryDirectory() as name,
        Workers(Plan(suite, networks(cfg, suite.spec)[0], 0), 0) as workers,
    ):
        saver = Saver(Path(name), agent, optimizers, replay, workers, {})
        log = Log(Journal(Path(name)), spec, Progress(0), False)

        def save() -> Path:
            clock.env_steps += 1
            return saver.save(clock, log)

        told, place = cost(Path(name), save, "first")
        told |= {"delta bytes": new * len(spec.tasks) * bytes_per_transition(spec)}
        told |= {"model bytes": sum(path.stat().st_size for path in place.iterdir())}
        for turn in ("second", "third"):
            fill(replay, new)
            found, place = cost(Path(name), save, turn)
            told |= found
        if not restore:
            return told
        before = hashlib.sha256(replay.rows.numpy().data).digest()
        replay.rows.zero_()
        began = time.perf_counter()
        saver.restore(place, checkpoint.verify(place), clock)
        told["restore seconds"] = time.perf_counter() - began
        assert hashlib.sha256(replay.rows.numpy().data).digest() == before
        return told


def fill(replay: Replay, rows: int) -> None:
    """Append experience by the thousand, as a run's rounds do."""
    for first in range(0, rows, 1000):
        replay.extend(random_rollout(replay.spec, min(1000, rows - first), seed=first))


def cost(run: Path, save: Callable[[], Path], turn: str) -> tuple[dict[str, float], Path]:
    """Measure the bytes and seconds of a save, and the growth of the process meanwhile."""
    there = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, began = memory("VmRSS"), time.perf_counter()
    place = save()
    seconds, grown = time.perf_counter() - began, memory("VmHWM") / resident - 1.0
    new = [
        path
        for path in run.rglob("*")
        if path.is_file() and path.stat().st_mtime_ns != there.get(path)
    ]
    written = sum(path.stat().st_size for path in new)
    return {f"{turn} bytes": written, f"{turn} seconds": seconds, f"{turn} memory": grown}, place


def memory(name: str) -> float:
    """Return a memory figure of this process, in KiB."""
    return float(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def in_words(told: dict[str, float]) -> str:
    units = {
        "bytes": lambda value: f"{value / 1e6:.1f} MB",
        "seconds": lambda value: f"{value:.2f} s",
    }
    share = "{:+.1%}".format
    return ", ".join(
        f"{name} {units.get(name.split()[1], share)(value)}" for name, value in told.items()
    )


def frugal(told: dict[str, float]) -> bool:
    """Return True if a save writes no more than necessary."""
    return (
        max(told["second bytes"], told["third bytes"])
        <= 3.0 * told["delta bytes"] + told["model bytes"]
    )


@pytest.mark.timed
@pytest.mark.reliability
@pytest.mark.bar(8)
@pytest.mark.parametrize("transitions", [1_000_000, 10_000_000])
def test_what_a_save_costs(transitions, record_property):
    """Report the first save, which writes everything; assert the others."""
    room = 3 * 400 * transitions
    if (
        shutil.disk_usage(tempfile.gettempdir()).free < room
        or psutil.virtual_memory().available < room
    ):
        pytest.skip(f"{room / 1e9:.0f} GB of memory and disk are needed")
    told = measured(transitions // 10, 10_000)
    record_property("measured", f"{transitions:,} transitions: {in_words(told)}")
    assert frugal(told), told
    assert max(told["second seconds"], told["third seconds"]) <= 1.0, told
    assert max(told["second memory"], told["third memory"]) <= 0.1, told


WASTEFUL = MEASURE.replace(
    "print(",
    "from softmod.checkpoint.replay_files import Archive\n"
    "Archive._last = lambda archive: 0\nprint(",
).replace("restore=True", "restore=False")


@pytest.mark.reliability
@pytest.mark.control(8)
def test_seen_failing_everything_is_written_each_time():
    assert frugal(measured(10_000, 1000))
    assert not frugal(measured(10_000, 1000, WASTEFUL))


# --- 16: the replay against a list ----------------------------------------------------------------


def unwritten(capacity: int, copies: int) -> Replay:
    """Return a replay in which unwritten values are NaN."""
    replay = Replay(FRAMES, capacity, copies=copies)
    replay.rows.fill_(torch.nan)
    replay.episodes.fill_(torch.nan)
    return replay


def reloaded(replay: Replay) -> Replay:
    """Restore another replay from a save; saved again, the files are equal."""
    with tempfile.TemporaryDirectory() as name:
        runs = [Path(name, part) for part in ("one", "other", "again")]
        for run in runs:
            run.mkdir()
        first, second = (unwritten(replay.capacity, replay.copies) for _ in range(2))
        pieces = Archive(runs[0], replay).save()
        Archive(runs[0], first).restore(pieces, replay.written)
        again = Archive(runs[1], first).save()
        assert again == pieces  # names and hashes
        Archive(runs[1], second).restore(again, replay.written)
        assert Archive(runs[2], second).save() == pieces
    return second


def follow(capacity: int, copies: int, events: list[Any]) -> None:
    """Compare the replay with lists after each event of a run."""
    replay, stream = unwritten(capacity, copies), Stream(FRAMES, copies)
    for event in events:
        if event == "reload":
            replay = reloaded(replay)
        else:
            replay.extend(stream.rollout(event))
        assert replay.written == len(stream.lists[0])
        assert replay.rows[:, min(replay.written, replay.ring) :].isnan().all()
        if replay.size:
            agree(replay, stream, 2, draws=20)


@pytest.mark.reliability
@pytest.mark.bar(16)
def test_the_replay_is_a_list_of_each_task(record_property):
    tried = {"examples": 0, "wrapped around": 0, "reloads": 0}

    @settings(max_examples=500, deadline=None)
    @given(
        st.integers(3, 30), st.integers(1, 3),
        st.lists(st.one_of(st.integers(1, 12), st.just("reload")), max_size=12),
    )  # fmt: skip
    def examples(capacity: int, copies: int, events: list[Any]) -> None:
        tried["examples"] += 1
        tried["reloads"] += events.count("reload")
        tried["wrapped around"] += (
            copies * sum(event for event in events if event != "reload") > capacity
        )
        follow(capacity, copies, events)

    examples()
    assert tried["examples"] >= 500
    assert min(tried.values()) >= 100
    record_property("tried", ", ".join(f"{count} {what}" for what, count in tried.items()))


@pytest.mark.control(16)
@pytest.mark.parametrize("events", [[3], [9, "reload"]])
def test_seen_failing_a_cursor_that_is_off_by_one(monkeypatch, events):
    append = Replay._append

    def shifted(self: Replay, rows: torch.Tensor) -> None:
        self.written += 1
        append(self, rows)
        self.written -= 1

    follow(8, 1, events)
    monkeypatch.setattr(Replay, "_append", shifted)
    with pytest.raises(AssertionError):
        follow(8, 1, events)


@pytest.mark.control(16)
def test_seen_failing_episodes_that_are_forgotten(monkeypatch):
    follow(8, 1, [30, 30, "reload"])
    monkeypatch.setattr(Replay, "_enter", lambda *_: None)
    with pytest.raises(AssertionError):
        follow(8, 1, [30, 30, "reload"])
