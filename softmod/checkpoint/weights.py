"""A trained policy without replay and optimizers: a small checkpoint that `softmod.load` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softmod.checkpoint import files as checkpoint

STATE_OF_A_RUN = ("counters", "begun", "log")  # metadata that only resuming needs


def save_weights(source: Path, metadata: dict[str, Any], folder: Path) -> Path:
    """Write the acting policy, the critics and the statistics of a checkpoint; return the folder.

    Target critics are left out, and so is a policy that is not the one that acts.

    Args:
        source: the checkpoint.
        metadata: its metadata.
        folder: the new checkpoint's folder.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SaveError: the new one cannot be written.
    """
    arrays = checkpoint.arrays(source, "agent")
    averaged = any(name.startswith("averaged_actor.") for name in arrays)
    left_out = ("target_critic.", *(("actor.",) if averaged else ()))
    kept = {name: array for name, array in arrays.items() if not name.startswith(left_out)}
    known = {key: value for key, value in metadata.items() if key not in STATE_OF_A_RUN}
    return checkpoint.save(folder, {"agent": kept}, known | {"kind": "weights"})
