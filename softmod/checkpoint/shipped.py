"""The trained policies that ship with softmod. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "policies"  # checkpoints without replay and optimizers


def shipped() -> list[str]:
    """Return the names of the policies."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json"))
