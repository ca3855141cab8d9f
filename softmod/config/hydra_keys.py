"""What a configuration may say of Hydra itself: nothing that runs code.

Files in a folder of somebody else's (`--config-dir`) can configure Hydra too: its callbacks,
launchers and loggers are classes named by strings, and its jobs get environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from softmod.config.instantiate import lies_in
from softmod.errors import ConfigError

PACKAGES = ("hydra", "hydra_plugins", "logging", "colorlog")  # whose classes may be named
CLASS_KEYS = ("_target_", "class", "()")
BUILT = (
    "callbacks",
    "launcher",
    "sweeper",
    "job_logging",
    "hydra_logging",
)  # parts that objects are made from
FOREIGN = re.compile(
    r"\$\{(?!hydra\.|oc\.env:|now:)"
)  # an interpolation that may bring in what was not looked at


def check_hydra(composed: DictConfig) -> None:
    """
    Raises:
        ConfigError: Hydra would build something of another package, or change the environment.
    """
    content: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    content["sweeper"].pop(
        "params", None
    )  # overrides: what they make is composed and checked by itself
    for path, value in leaves(content):
        key = ".".join(("hydra", *path))
        if path[-1] in CLASS_KEYS and not lies_in(str(value), PACKAGES):
            raise ConfigError(f"{key}={value}: must lie in {', '.join(PACKAGES)}")
        if path[0] in BUILT and FOREIGN.search(str(value)):
            raise ConfigError(f"{key}={value}: must be plain, or refer to hydra.* only")
        if path[:2] in (("job", "env_set"), ("job", "env_copy")):
            raise ConfigError(
                f"{key}={value}: is not allowed; write {path[-1]}=... in front of the command"
                " instead"
            )


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of nested mappings and lists, and the keys that lead to it."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from leaves(value, (*path, str(key)))
