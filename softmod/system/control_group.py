"""Limits of the control group that this process runs in: containers and schedulers set them.

Both versions of Linux's control groups are read. A limit of a group holds for the groups below it,
so that the smallest of those on the way up counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # bytes: version 1 states a limit of this order where there is none


def cores() -> float | None:
    """Return how many cores' time the group may use, as in 0.5; None: no limit."""
    limits = []
    for folder in folders("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
                period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
            if int(quota) > 0:
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory() -> int | None:
    """Return how many bytes of memory the group may use; None: no limit."""
    limits = []
    for folder in folders("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text(encoding="utf-8")))
    return min((limit for limit in limits if 0 < limit < UNLIMITED), default=None)


def folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it.

    Args:
        controller: whose hierarchy it is in version 1.
    """
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = ROOT
        elif controller in controllers.split(","):
            top = ROOT / controllers if (ROOT / controllers).is_dir() else ROOT / controller
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top
