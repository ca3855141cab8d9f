"""Keys missing from configurations saved by earlier versions, and their values then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADDED: dict[str, Any] = {
    "seeds": None,
    "init_from": None,
    "init_digest": None,
    "callbacks": [],
    "policy.exploration_noise": "white",
    "algorithm.value_scaling": "none",
    "algorithm.own": {},
    "fabric.kernels": "auto",
    "fabric.updates_per_graph": None,
    "tracking.model": True,
    "tracking.register": None,
}
# normalization of each network class before `norm` was a key; "none" for all others
NORM = {"softmod.networks.residual.Residual": "layer"}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys that this version expects to a saved configuration or to parts of one.

    Keys that were removed since are dropped.
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


def completed_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the missing keys to a saved configuration with dotted keys; `method` becomes `model`."""
    known = {"model" if key == "method" else key: value for key, value in config.items()}
    parts = {key.partition(".")[0] for key in known if "." in key}
    added = {
        key: value
        for key, value in ADDED.items()
        if "." not in key or key.partition(".")[0] in parts
    }
    for part in ("actor", "critic"):
        path = str(known.get(f"{part}._target_"))
        if path.startswith("softmod.networks."):
            added[f"{part}.norm"] = NORM.get(path, "none")
    return added | known
