"""A run's folder: nothing in it leads elsewhere, and the run beside it that a configuration may
have meant.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmod.errors import ConfigError
from softmod.tracking.record import JOURNAL, lines

# differences between two configurations that are told; beyond, they are not meant to be the same
TOLD = 3


def refuse_links(folder: Path, within: Path | None = None) -> None:
    """See that what is written into a run's folder stays there, and that reading from it ends.

    Args:
        folder: the run's.
        within: a folder above it; between the two there may be no link either.

    Raises:
        ConfigError: something is a link, or neither a file nor a folder.
    """
    above = [path for path in (*folder.parents, folder) if within in path.parents]
    inside = (
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    for path in (*above, *inside):
        with suppress(OSError):  # there is none, or no longer
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"{path}: is a link; a run's folder holds none, since they may lead out of it"
                )
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ConfigError(f"{path}: is neither a file nor a folder")


def nearest_run(folder: Path, wanted: Mapping[str, Any]) -> str | None:
    """In which values the run nearest to a folder that holds none differs from what is wanted of
    it.

    Args:
        folder: where the run would be, `.../<name>-<identity>/seed_<seed>`.
        wanted: the values, with dotted keys, that make a run another one.
    """
    runs = [
        path.parent for path in folder.parent.parent.glob(f"*/seed_*/{JOURNAL}") if path.is_file()
    ]
    found = [(differences(begun_with(run), wanted), run) for run in sorted(runs)]
    changed, run = min(found, key=lambda pair: len(pair[0]), default=({}, folder))
    if not 0 < len(changed) <= TOLD:
        return None
    return ", ".join(
        f"{key}={wanted[key]}: the run in {run} has {theirs}" for key, theirs in changed.items()
    )


def differences(theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """List what a run has where something else is wanted."""
    return {
        key: theirs.get(key, "none")
        for key, value in wanted.items()
        if theirs.get(key, "none") != value
    }


def begun_with(run: Path) -> dict[str, Any]:
    """The configuration that a run's journal begins with."""
    with suppress(OSError):
        for line, _ in lines(run / JOURNAL):
            if line["kind"] == "params":
                return dict(line["values"])
    return {}
