"""Finished runs as data of a repository: `results/<name>/seed_<n>.json`, enough for every table and
figure of a report.

A file holds the command, the commit, the machine, the versions, the whole configuration, the curves
and the last evaluation; weights and the replay stay in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from softmod.checkpoint import files as checkpoint
from softmod.errors import CheckpointError, ConfigError
from softmod.report.runs import FINISHED, Run, renamed
from softmod.tracking.names import (
    ENV_STEPS_PER_SECOND,
    SUCCESS_MEAN,
    TRAINING_SECONDS,
    UPDATES_PER_SECOND,
)

FORMAT = 1
RATES = (TRAINING_SECONDS, ENV_STEPS_PER_SECOND, UPDATES_PER_SECOND)
KEPT = (
    SUCCESS_MEAN.rpartition("/")[0],
    "train/success_rate",
    *RATES,
)  # how the names of kept curves begin
DIGITS = 7  # significant ones of a curve's values


def save(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Write a file for each finished run, named by its seed; return their paths.

    Raises:
        ConfigError: a run is not finished, or two have the same seed.
        SaveError: the disk refused.
    """
    chosen = list(runs)
    unfinished = [run.source for run in chosen if run.status != FINISHED]
    if unfinished:
        raise ConfigError(
            f"save={folder}: {unfinished[0]} is not finished; results are of finished runs"
        )
    seeds = [run.seed for run in chosen]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        raise ConfigError(
            f"save={folder}: two runs with seed {min(twice)}; results/<name> holds one run for each"
            " seed"
        )
    written = []
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for run in chosen:
            path = folder / f"seed_{run.seed}.json"
            path.write_text(json.dumps(facts(run), indent=1) + "\n")
            written.append(path)
    return written


def facts(run: Run) -> dict[str, Any]:
    """Return what is kept of a run."""
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
    """Read the results in these folders, or below them.

    Raises:
        ConfigError: there are none, or a file is damaged.
    """
    runs = []
    for folder in folders:
        paths = sorted(Path(folder).rglob("seed_*.json"))
        if not paths:
            raise ConfigError(f"results={folder}: no seed_<n>.json there")
        runs += [_run(path) for path in paths]
    return runs


def _run(path: Path) -> Run:
    try:
        with checkpoint.reading(path):
            told = json.loads(path.read_text())
            if told["format"] != FORMAT:
                raise ConfigError(f"{path}: format {told['format']}, this version reads {FORMAT}")
            values = {
                name: {int(step): float(value) for step, value in curve}
                for name, curve in told["curves"].items()
            }
            return Run(str(path), FINISHED, renamed(told["config"]), values, told["tags"])
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
