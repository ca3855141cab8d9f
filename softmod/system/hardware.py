"""Versions of software and source, processor, and usage of processor and memory."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from softmod.system import control_group

PACKAGES = ("softmod", "torch", "lightning", "metaworld", "mujoco", "gymnasium", "numpy", "mlflow")


def environment_tags() -> dict[str, str]:
    """Return the versions of packages, and the commit of softmod's source if it is a checkout."""
    tags = {"version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    if _git("ls-files", "__init__.py"):  # untracked if softmod is installed
        tags["softmod.commit"] = _git("rev-parse", "HEAD")
        tags["softmod.dirty"] = str(
            bool(_git("status", "--porcelain", "--untracked-files=no"))
        ).lower()
    return tags


def hardware_tags(accelerator: str) -> dict[str, str]:
    """Return the tags of the processor, its usable cores, and the accelerator.

    Args:
        accelerator: name of the accelerator, or "none".
    """
    return {
        "machine.processor": processor(),
        "machine.cores": str(available()),
        "machine.accelerator": accelerator,
    }


def available() -> int:
    """Return the number of cores that this process may use: its affinity, within the limit of its
    control group, at least one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = control_group.cores()
    return max(1, min(cores or 1, math.ceil(limit) if limit else cores or 1))


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, within the limit of its
    control group.
    """
    import psutil

    there = int(psutil.virtual_memory().total)
    return min(there, control_group.memory() or there)


def processor() -> str:
    """Return the processor's model name; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _git(*arguments: str) -> str:
    """Return the output of a git command in softmod's source; empty if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    environment = {
        name: value
        for name, value in os.environ.items()
        # GIT_DIR and its like, as a hook has them, name another repository.
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")
    }
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=5.0, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Usage:
    """Processor time and memory of a process and its descendants.

    Args:
        pid: id of the process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.last: tuple[float, float] | None = None  # wall clock and processor seconds

    def read(self) -> dict[str, float]:
        """Return memory (GiB and percent), and processor time since the last call.

        Processor time is in percent of one core, and missing from the first call. Empty if the
        process is gone.
        """
        import psutil

        clock = time.monotonic()
        seconds = 0.0
        resident = 0
        try:
            top = psutil.Process(self.pid)
            for process in [top, *top.children(recursive=True)]:
                with suppress(psutil.Error), process.oneshot():
                    times = process.cpu_times()
                    seconds = seconds + times.user + times.system
                    resident = resident + process.memory_info().rss
        except psutil.Error:
            return {}
        values = {
            "memory_gib": resident / 2**30,
            "memory_percent": psutil.virtual_memory().percent,
        }
        if self.last is not None and clock > self.last[0]:
            then, before = self.last
            values["cpu_percent"] = max(0.0, 100.0 * (seconds - before) / (clock - then))
        self.last = clock, seconds
        return values
