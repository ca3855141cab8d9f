"""Fault bundle: the inputs of the last update, saved when updates stay non-finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softmod.agent.mtsac import MTSAC
from softmod.checkpoint import files as checkpoint

KIND = "fault"


def bundle(folder: Path, agent: MTSAC, optimizers: list[Any], metadata: dict[str, Any]) -> Path:
    """Save agent, optimizers, batch and noise of the last update; return the bundle's folder.

    `softmod.replay_fault` repeats the update from it.

    Raises:
        SaveError: the bundle cannot be written.
    """
    batch, noise, next_noise = agent.last_given()
    groups = {
        "agent": dict(agent.state_dict()),
        "optimizers": checkpoint.optimizer_arrays(optimizers),
        "given": batch._asdict() | {"noise": noise, "next_noise": next_noise},
    }
    metadata = metadata | {"kind": KIND, "update": agent.updates}
    return checkpoint.save(folder / f"update_{agent.updates:012d}", groups, metadata)
