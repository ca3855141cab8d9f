"""Checks of a run's folder: no links in it, and similar runs beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmod.checkpoint.shipped import SHIPPED
from softmod.errors import ConfigError
from softmod.tracking.record import JOURNAL, lines

MAX_DIFFERENCES = 3  # values in which a run may differ and still count as similar


def refuse_links(folder: Path, within: Path | None = None) -> None:
    """Check that a run's folder holds only regular files and folders.

    A link could lead writes out of the folder, and reading a named pipe could block for ever.

    Args:
        folder: the run's folder.
        within: a folder above it; path components between the two are checked too.

    Raises:
        ConfigError: something is a link, or neither a file nor a folder.
    """
    above = [path for path in (*folder.parents, folder) if within in path.parents]
    inside = (
        Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files)
    )
    for path in (*above, *inside):
        with suppress(OSError):  # does not exist, or no longer
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"{path}: is a link; links are not allowed in a run's folder, remove it"
                )
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ConfigError(f"{path}: is neither a file nor a folder; remove it")


def run_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run; one that was copied has none but that above it.

    For a policy that ships with softmod it is a folder below `runs`.
    """
    above = checkpoint.resolve().parent
    run = above.parent if above.name == "checkpoints" else above
    run = Path("runs", checkpoint.name) if above == SHIPPED.resolve() else run
    return Path(os.path.relpath(run)) if run.is_relative_to(Path.cwd()) else run


def output_folder(given: str | None, checkpoint: Path, name: str) -> Path:
    """Create the folder for the output of a command on a checkpoint; return its path.

    Args:
        given: path on the command line; None: the folder `name` of the checkpoint's run, or below
            `runs` for a policy that ships with softmod.
        checkpoint: the checkpoint's folder.
        name: what the output is.

    Raises:
        ConfigError: It cannot be created, or it is a link that leads out of the run's folder.
    """
    output = Path(given) if given else run_of(checkpoint) / name
    if not given:
        refuse_links(output, within=output.parent)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written ({error.strerror})") from error
    return output


def nearest_run(folder: Path, wanted: Mapping[str, Any]) -> str | None:
    """Describe the differences to the most similar run, if there are at most `MAX_DIFFERENCES`.

    Args:
        folder: folder that the wanted run would have, `.../<name>-<identity>/seed_<seed>`.
        wanted: the values, with dotted keys, that determine a run's identity.

    Returns:
        One line; None if no run is similar.
    """
    runs = [
        path.parent for path in folder.parent.parent.glob(f"*/seed_*/{JOURNAL}") if path.is_file()
    ]
    found = [(differences(initial_params(run), wanted), run) for run in sorted(runs)]
    changed, run = min(found, key=lambda pair: len(pair[0]), default=({}, folder))
    if not 0 < len(changed) <= MAX_DIFFERENCES:
        return None
    return ", ".join(
        f"{key}={wanted[key]}: the run in {run} has {theirs}" for key, theirs in changed.items()
    )


def differences(theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's values that differ from the wanted ones; "none" where it has no value."""
    return {
        key: theirs.get(key, "none")
        for key, value in wanted.items()
        if theirs.get(key, "none") != value
    }


def initial_params(run: Path) -> dict[str, Any]:
    """Return the configuration that a run started with, from its journal; empty if unreadable."""
    with suppress(OSError):
        for line, _ in lines(run / JOURNAL):
            if line["kind"] == "params":
                return dict(line["values"])
    return {}
