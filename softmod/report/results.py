"""Results of finished runs, small enough to be committed: `results/<name>/seed_<n>.json`.

A file holds the command, the commit, the machine, the versions, the configuration, the curves and
the last evaluation. All tables and figures of a report can be made from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from softmod.checkpoint import files as checkpoint
from softmod.config.earlier import completed_keys
from softmod.errors import CheckpointError, ConfigError
from softmod.report.runs import FINISHED, Run, files_below
from softmod.tracking.names import (
    ENV_STEPS_PER_SECOND,
    SUCCESS_MEAN,
    TRAINING_SECONDS,
    UPDATES_PER_SECOND,
)

FORMAT = 1
RATES = (TRAINING_SECONDS, ENV_STEPS_PER_SECOND, UPDATES_PER_SECOND)
KEPT = (SUCCESS_MEAN.rpartition("/")[0], "train/success_rate", *RATES)  # prefixes of saved curves
DIGITS = 7  # significant digits of a curve's values


def save(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Write a file for each finished run, named by its seed; return the paths.

    Raises:
        ConfigError: A run is not finished, or two runs have the same seed.
        SaveError: A file cannot be written.
    """
    chosen = list(runs)
    unfinished = [run.source for run in chosen if run.status != FINISHED]
    if unfinished:
        raise ConfigError(
            f"save={folder}: {unfinished[0]} is not finished; only finished runs can be saved"
        )
    seeds = [run.seed for run in chosen]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        raise ConfigError(
            f"save={folder}: two runs with seed {min(twice)}; a folder of results holds one run per"
            " seed"
        )
    written = []
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for run in chosen:
            path = folder / f"seed_{run.seed}.json"
            path.write_text(json.dumps(as_values(run), indent=1) + "\n", encoding="utf-8")
            written.append(path)
    return written


def as_values(run: Run) -> dict[str, Any]:
    """Convert a run to the content of its file."""
    last = max(run.values[SUCCESS_MEAN])
    kinds = ("machine.", "version.", "softmod.")
    tags = {key: value for key, value in sorted(run.tags.items()) if key.startswith(kinds)}
    return {
        "format": FORMAT,
        "seed": run.seed,
        "command": run.tags.get("softmod.command", ""),
        "env_steps": last,
        "minutes": round(run.values[TRAINING_SECONDS][last] / 60, 4),
        "success_rate": dict(zip(run.tasks, run.success().tolist(), strict=True)),
        "tags": tags,
        "config": {
            key: value
            for key, value in run.config.items()
            if not key.startswith(("tracking.", "allow"))
        },
        "curves": {
            name: [[step, float(f"{value:.{DIGITS}g}")] for step, value in sorted(values.items())]
            for name, values in sorted(run.values.items())
            if name.startswith(KEPT)
        },
    }


def load(folders: Sequence[str]) -> list[Run]:
    """Read the results in these folders and below them.

    Raises:
        ConfigError: There are none, a folder cannot be read, or a file is damaged.
    """
    runs = []
    for folder in folders:
        paths = sorted(files_below(folder, "results", "seed_*.json"))
        if not paths:
            raise ConfigError(f"results={folder}: there is no seed_<n>.json in it")
        runs += [_run(path) for path in paths]
    return runs


def _run(path: Path) -> Run:
    """Read a run from its file."""
    try:
        with checkpoint.reading(path):
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ConfigError(f"{path}: format {saved['format']}, this version reads {FORMAT}")
            values = {
                name: {int(step): float(value) for step, value in curve}
                for name, curve in saved["curves"].items()
            }
            return Run(str(path), FINISHED, completed_keys(saved["config"]), values, saved["tags"])
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
