"""Which classes a saved configuration may name. Nothing that comes out of a checkpoint is trusted.

What is typed on a command line, or kept in a configuration folder of one's own, is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from softmod.config.instantiate import resolve_target
from softmod.errors import ConfigError

PARTS = {  # where the classes of each part are: others could do harm when they are built
    "env": "softmod.envs", "actor": "softmod.networks", "critic": "softmod.networks",
    "critic_head": "softmod.agent", "algorithm": "softmod.agent", "optimizer": "torch.optim",
}  # fmt: skip


def check(config: Mapping[str, Any], allow: Iterable[str]) -> None:
    """Check every class that a saved configuration names, by what the name resolves to.

    A saved configuration has no interpolations: they are resolved before it is saved, and one that
    is there could run code when it is resolved.

    Args:
        config: of a run, or some parts of it.
        allow: packages of the user's own that may be named too.

    Raises:
        ConfigError: a class is in none of these packages, or not there, or a value is an
            interpolation.
    """
    for key, value in leaves(config):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{key}={value:.100}: a saved configuration has no interpolations")
    for key, path in targets(config):
        packages = (*([PARTS[key.split(".")[0]]] if key.split(".")[0] in PARTS else []), *allow)
        within(key, path, packages)
        found = resolve_target(path, key)
        within(key, f"{found.__module__}.{found.__qualname__}", packages)


def foreign(config: Mapping[str, Any]) -> list[str]:
    """Return the packages that have to be allowed when this configuration is read again."""
    known = tuple(PARTS.values())
    roots = {path.split(".")[0] for _, path in targets(config) if not lies_in(path, known)}
    return sorted(roots)


def within(key: str, path: str, packages: tuple[str, ...]) -> None:
    """
    Raises:
        ConfigError: the path is in none of the packages.
    """
    if not lies_in(path, packages):
        raise ConfigError(
            f"{key}._target_={path}: must be in {', '.join(packages) or 'no package'}"
            " (allow=[package])"
        )


def lies_in(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every `_target_`, and the key of what it stands in."""
    for key, value in leaves(config):
        part, _, name = key.rpartition(".")
        if name == "_target_":
            yield part, str(value)


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings and lists, and its key; keys of mappings as values too,
    where they are no plain words.
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
