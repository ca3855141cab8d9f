"""Keys that saved configurations of earlier versions lack, and the values that they stood for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADDED: dict[str, Any] = {
    "seeds": None,
    "callbacks": [],
    "policy.exploration_noise": "white",
    "algorithm.value_scaling": "none",
    "algorithm.own": {},
    "fabric.kernels": "auto",
}
NORM = {"softmod.networks.residual.Residual": "layer"}  # of networks, before it was an option


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, or some parts of it, with what this version expects.

    A key that is no longer there is left out.
    """
    whole = {name: value for name, value in config.items() if name != "allow"}
    for key, value in ADDED.items():
        part, _, name = key.rpartition(".")
        if not part:
            whole.setdefault(name, value)
        elif isinstance(whole.get(part), Mapping):
            whole[part] = {name: value} | dict(whole[part])
    for part in ("actor", "critic"):
        network = whole.get(part)
        path = str(network.get("_target_")) if isinstance(network, Mapping) else ""
        if path.startswith("softmod.networks."):
            whole[part] = {"norm": NORM.get(path, "none")} | dict(network or {})
    return whole
