"""What a run leaves when its updates stay non-finite: all that the last of them was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softmod.agent.mtsac import MTSAC
from softmod.checkpoint import files as checkpoint

KIND = "fault"


def bundle(folder: Path, agent: MTSAC, optimizers: list[Any], about: dict[str, Any]) -> Path:
    """Write down the last update that an agent tried; where.

    Raises:
        SaveError: the disk refused.
    """
    batch, noise, next_noise = agent.last_given()
    groups = {
        "agent": dict(agent.state_dict()),
        "optimizers": checkpoint.optimizer_arrays(optimizers),
        "given": batch._asdict() | {"noise": noise, "next_noise": next_noise},
    }
    facts = about | {"kind": KIND, "update": agent.updates}
    return checkpoint.save(folder / f"update_{agent.updates:012d}", groups, facts)
