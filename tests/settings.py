"""Options of networks and algorithms as `conf/` has them, for tests that build parts themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from softmod.config.compose import compose
from softmod.config.schema import TrackingConfig
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network


@cache
def options(override: str, key: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(compose([override], "train")[key], resolve=True)
    for name in ("_target_", "own"):
        values.pop(name, None)
    return values


def network(option: str, **changed: Any) -> dict[str, Any]:
    """The options of a network in `conf/network`, some of them changed."""
    return options(f"network@actor={option}", "actor") | changed


def algorithm(option: str = "mtsac", **changed: Any) -> dict[str, Any]:
    """The options of an algorithm in `conf/algorithm`, some of them changed."""
    return options(f"algorithm={option}", "algorithm") | changed


def tracking(**changed: Any) -> TrackingConfig:
    """Where metrics go as `conf/tracking/mlflow` has it, some of it changed."""
    return TrackingConfig(**(options("tracking=mlflow", "tracking") | changed))


def published(network: Network, normalize_obs: bool = False) -> Actor:
    """A network as the published policy: its log standard deviation is clamped."""
    return Actor(network, "clamp", normalize_obs)
