"""Classes that a saved configuration may name. Nothing read from a checkpoint is trusted.

Overrides on a command line and files in the user's configuration folder are trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from softmod.config.instantiate import resolve_target
from softmod.errors import ConfigError

PARTS = {  # packages of each part's classes; instantiating any other class could run harmful code
    "env": "softmod.envs", "actor": "softmod.networks", "critic": "softmod.networks",
    "critic_head": "softmod.agent", "algorithm": "softmod.agent", "optimizer": "torch.optim",
}  # fmt: skip


def check(config: Mapping[str, Any], allow: Iterable[str] | None) -> None:
    """Check every class that a saved configuration names, after resolving the name.

    Interpolations are resolved before a configuration is saved. One in a saved configuration
    could run code when it is resolved, so it is rejected.

    Args:
        config: Configuration of a run, or parts of it.
        allow: Packages of the user that are allowed too.

    Raises:
        ConfigError: A class does not exist or is outside these packages, or a value is an
            interpolation.
    """
    for key, value in leaves(config):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{key}={value:.100}: no interpolations are allowed in a saved configuration"
            )
    for key, path in targets(config):
        part = key.split(".")[0]
        packages = (*([PARTS[part]] if part in PARTS else []), *packages_of(allow))
        within(key, path, packages)
        found = resolve_target(path, key)
        within(key, f"{found.__module__}.{found.__qualname__}", packages)


def packages_of(allow: Iterable[str] | None) -> list[str]:
    """Return packages that the user allows as a list; the name of a single one is accepted too."""
    return [allow] if isinstance(allow, str) else list(allow or ())


def foreign(config: Mapping[str, Any]) -> list[str]:
    """List the packages that have to be allowed to load this configuration again."""
    known = tuple(PARTS.values())
    roots = {path.split(".")[0] for _, path in targets(config) if not lies_in(path, known)}
    return sorted(roots)


def within(key: str, path: str, packages: tuple[str, ...]) -> None:
    """Check that a class is in one of the packages.

    Raises:
        ConfigError: It is in none of them.
    """
    if not lies_in(path, packages):
        raise ConfigError(
            f"{key}._target_={path}: must be in {', '.join(packages) or 'no package'}"
            f" (allow=[{path.split('.')[0]}])"
        )


def lies_in(path: str, packages: Iterable[str]) -> bool:
    """Return whether a dotted path is in one of the packages."""
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key of every node with a `_target_`, and the `_target_`."""
    for key, value in leaves(config):
        part, _, name = key.rpartition(".")
        if name == "_target_":
            yield part, str(value)


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested mappings and lists.

    Mapping keys that contain an interpolation are yielded as values too.
    """
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        yield key, node
        return
    for name, value in node.items():
        if "${" in str(name):
            yield key, str(name)
        yield from leaves(value, f"{key}.{name}".lstrip("."))
