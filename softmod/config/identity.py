"""Identity of a configuration: a hash of all values that affect results; and a run's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmod.config import schema

NOT_RESULTS = {
    "": ("seed", "seeds", "name", "tracking", "published_task_weights", "callbacks", "init_from"),
    "env": ("fast",),
    "run": ("steps_per_task", "max_minutes", "stop_at", "resume", "folder", "eval_every",
            "eval_goals",
            "final_eval_goals", "save_every", "log_every"),
    "workers": ("processes", "timeout"),
    "fabric": ("accelerator", "threads", "compile", "kernels", "deterministic",
               "updates_per_graph"),
}  # fmt: skip


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


def as_values(cfg: schema.TrainConfig) -> dict[str, Any]:
    """Convert a configuration to nested mappings of plain values."""
    return dataclasses.asdict(cfg)


def of_results(cfg: schema.TrainConfig) -> dict[str, Any]:
    """Return the values that affect results, without the seed."""
    values = as_values(cfg)
    for part, names in NOT_RESULTS.items():
        node = values[part] if part else values
        for name in names:
            node.pop(name)
    if not values["algorithm"]["own"]:
        del values["algorithm"]["own"]  # keeps the identities from before this key existed
    if values["init_digest"] is None:
        del values["init_digest"]  # likewise
    return values


def identity(cfg: schema.TrainConfig) -> str:
    """Hash all values that affect results, without the seed.

    Runs with equal identities are seeds of one configuration.

    Returns:
        Eight hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(of_results(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(cfg: schema.TrainConfig) -> Path:
    """Return the path of a run's folder, `runs/<name>-<identity>/seed_<seed>`."""
    return Path(cfg.run.folder) / f"{cfg.name}-{identity(cfg)}" / f"seed_{cfg.seed}"
