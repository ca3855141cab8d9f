"""Construction of a policy from a configuration."""

from __future__ import annotations

from typing import Any

from softmod.config.instantiate import build
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.spec import EnvSpec


def build_actor(node: Any, log_std: str, normalize_obs: bool, spec: EnvSpec) -> Actor:
    """Build the policy of a configuration's `actor` node and its `policy` options.

    Raises:
        ConfigError: the node's class is not a network, or does not accept its options.
    """
    sizes = {"in_dim": spec.obs_dim, "out_dim": 2 * spec.action_dim, "num_tasks": spec.num_tasks}
    network: Network = build(node, "actor", Network, **sizes, stack=1)
    return Actor(network, log_std, normalize_obs)
