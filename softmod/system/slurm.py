"""The SLURM job that a run belongs to: whether it runs again after it was stopped, its GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Collection, Mapping

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # before the time limit; submitit sends SIGUSR2


def number(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the number of this job as `scontrol` takes it; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def ensure_rerun(
    received: Collection[int], environment: Mapping[str, str] = os.environ
) -> tuple[bool, str]:
    """Make sure that SLURM runs this job again, if it was stopped before its end.

    A job that was warned before its time limit, and one that was preempted with a grace period,
    have to ask for it while they still run. SLURM itself queues a job again that is preempted
    without a grace period or whose node fails. Neither a cancelled job nor one that SLURM stopped
    at its time limit without a warning runs again. Only the first task of a job asks.

    Args:
        received: signals that the run received.
        environment: with SLURM's variables.

    Returns:
        Whether the job runs again, and a phrase about it for the terminal, which is empty for a
        job that is not to run again.
    """
    job = number(environment)
    if job is None or environment.get("SLURM_PROCID", "0") != "0":
        return False, ""
    if not set(WARNINGS) & set(received):
        about = description(job)
        restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        if int(about.get("Restarts", "0")) > restarts:
            return True, f"SLURM has queued job {job} again"
        if about.get("PreemptTime", "None") == "None":
            return False, ""
    refused = _scontrol("requeue", job)[1]
    if refused is not None:
        return False, f"SLURM does not queue job {job} again ({refused})"
    return True, f"job {job} is queued again"


def description(job: str) -> dict[str, str]:
    """Return what SLURM says of a job, by the names of `scontrol show job`; empty if nothing."""
    return _fields(_scontrol("show", "job", "--oneliner", job)[0])


def idle_gpus(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return which GPUs this job has or its node offers, for a job that trains on the CPU.

    Returns:
        A phrase for a warning; None outside SLURM and on a node without GPUs.
    """
    if number(environment) is None:
        return None
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if environment.get(name):
            return f"SLURM gave it GPU {environment[name]}"
    node = environment.get("SLURMD_NODENAME")
    gres = _fields(_scontrol("show", "node", "--oneliner", node)[0]).get("Gres", "") if node else ""
    return f"its node {node} has {gres}, of which it requested none" if "gpu" in gres else None


def _scontrol(*arguments: str) -> tuple[str, str | None]:
    """Call `scontrol`; return its output, and in one line why it failed, if it did."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, (" ".join(done.stderr.split()) or "failed") if done.returncode else None


def _fields(line: str) -> dict[str, str]:
    """Return the fields of a line of `scontrol show`."""
    pairs = (word.partition("=") for word in line.split() if "=" in word)
    return {name: value for name, _, value in pairs}
