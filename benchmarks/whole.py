"""Whole commands: env steps per second of a run and of its two halves, start-up, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pairing import Figure, Rate, alternate

RUN, COLLECT, LEARN = "whole run", "collecting alone", "learning alone"
NEVER = 1_000_000_000


def rates(experiment: str, steps_per_task: int, turns: int) -> list[Figure]:
    """Measure the env steps per second of a run, of collecting alone, and of learning alone."""
    # a warm-up that does not end within the run
    idle = ["run.warmup_per_task=90000", "run.replay_per_task=100000"]
    rates: dict[str, Rate] = {
        RUN: partial(run_rate, experiment, steps_per_task),
        COLLECT: partial(run_rate, experiment, 4 * steps_per_task, *idle),
        LEARN: partial(learning_rate, experiment),
    }
    return alternate(rates, "env steps/s", turns)


def run_rate(experiment: str, steps_per_task: int, *more: str) -> float:
    """Return the env steps per second in a run's journal, without the first reports (start-up)."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = train(folder, experiment, steps_per_task, *more)
        (journal,) = Path(folder).glob("runs/*/*/journal.jsonl")
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
    reports = [
        line["values"] for line in lines if "time/env_steps_per_second" in line.get("values", {})
    ]
    rates = [values["time/env_steps_per_second"] for values in reports[2:]]
    assert rates, f"{experiment}: {len(reports)} reports of {tasks} tasks"
    return len(rates) / sum(1.0 / rate for rate in rates)


def train(folder: str, experiment: str, steps_per_task: int, *more: str) -> int:
    """Train in a folder without evaluations and checkpoints; return the number of tasks."""
    from softmod.config.compose import compose

    tasks = len(compose([f"experiment={experiment}"]).env.tasks)
    every = max(1, steps_per_task * tasks // 12)
    quiet = [
        f"run.eval_every={NEVER}",
        f"run.save_every={NEVER}",
        "run.final_eval_goals=1",
        "tracking=journal",
    ]
    line = [f"experiment={experiment}", f"run.steps_per_task={steps_per_task}",
            "run.warmup_per_task=100",
            f"run.log_every={every}", "run.max_minutes=null", *quiet, *more]  # fmt: skip
    command([sys.executable, "-m", "softmod.train", *line], folder)
    return tasks


def learning_rate(experiment: str) -> float:
    """Measure the env steps per second that updates alone allow, in a process of its own."""
    code = f"from benchmarks.updates import learning_rate; print(learning_rate({experiment!r}))"
    return float(command([sys.executable, "-c", code], os.getcwd()).splitlines()[-1])


def command(line: list[str], folder: str) -> str:
    """Run a command to its end; return its standard output.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


# --- start-up and memory --------------------------------------------------------------------------


def startup(experiment: str) -> float:
    """Measure the seconds from the command to the end of the first round."""
    began = time.perf_counter()
    with started(experiment, "run.log_every=1", "tracking=journal") as (process, folder):
        while not any("train/" in text or "time/" in text for text in journals(folder)):
            assert process.poll() is None, "the run ended before its first round"
            time.sleep(0.02)
        return time.perf_counter() - began


def help_seconds() -> float:
    """Measure the seconds of `--help`."""
    began = time.perf_counter()
    command([sys.executable, "-m", "softmod.train", "--help"], os.getcwd())
    return time.perf_counter() - began


def peak_memory(experiment: str, seconds: float, *more: str) -> float:
    """Return the peak memory of a run's processes in GiB, sampled; shared pages count once."""
    with started(experiment, "tracking=journal", f"run.eval_every={NEVER}", *more) as (process, _):
        most, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end and process.poll() is None:
            family = [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]
            most = max(most, sum(member.memory_full_info().pss for member in family) / 2**30)
            time.sleep(0.5)
        return most


def busy(experiment: str, seconds: float) -> float:
    """Measure the fraction of all cores' time that a run's processes use after start-up."""
    quiet = [
        f"run.eval_every={NEVER}",
        f"run.save_every={NEVER}",
        "run.log_every=5000",
        "run.warmup_per_task=100",
    ]
    with started(experiment, "tracking=journal", "run.max_minutes=null", *quiet) as (
        process,
        folder,
    ):
        # updates are captured after a few reports
        while sum(text.count("time/env_steps_per_second") for text in journals(folder)) < 2:
            assert process.poll() is None, "the run ended before it was measured"
            time.sleep(0.1)
        began, used = time.perf_counter(), cpu_seconds(process.pid)
        time.sleep(seconds)
        used = cpu_seconds(process.pid) - used
        return used / (time.perf_counter() - began) / len(os.sched_getaffinity(0))


def cpu_seconds(pid: int) -> float:
    """Add up the processor seconds that a process and its living descendants have used."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(member.cpu_times().user + member.cpu_times().system for member in family)


def journals(folder: str) -> list[str]:
    """Return the text of the journals of all runs in a folder."""
    return [path.read_text() for path in Path(folder).glob("runs/*/*/journal.jsonl")]


@contextmanager
def started(experiment: str, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start training in a temporary folder; yield process and folder, and end it afterwards."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "softmod.train", f"experiment={experiment}", *more]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(line, cwd=folder, env=environment, **quiet)
        try:
            yield process, folder
        finally:
            process.terminate()
            process.wait()
