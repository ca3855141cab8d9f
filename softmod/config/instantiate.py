"""What a configuration may name as a class (`_target_`), and building it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from softmod.errors import ConfigError, near

PACKAGES = ("softmod", "torch.optim")  # what a _target_ may name, besides the user's own (`allow`)
PLACES = {  # and where the classes of each part lie: others could do harm when they are built
    "env": "softmod.envs", "actor": "softmod.networks", "critic": "softmod.networks",
    "algorithm": "softmod.agent",
    "critic_head": "softmod.agent", "optimizer": "torch.optim",
}  # fmt: skip


def target_of(node: Any) -> str:
    return str(
        node.get("_target_", "") if isinstance(node, Mapping) else getattr(node, "_target_", "")
    )


def allowed(module: str, allow: Iterable[str]) -> bool:
    return lies_in(module, (*PACKAGES, *allow))


def lies_in(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def within(part: str, path: str, allow: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: the class lies neither where those of this part do nor in a package of the
            user's own.
    """
    places = (PLACES[part.split(".")[0]], *allow)
    if not lies_in(path, places):
        raise ConfigError(
            f"{part}._target_={path}: must lie in {', '.join(places)} (allow=[package])"
        )


def resolve_target(path: str, allow: Iterable[str] = (), part: str = "") -> type:
    """The class that a `_target_` names, judged by what it resolves to and not by its spelling.

    Raises:
        ConfigError: not there, not a class, or its own module lies elsewhere, or where this `part`
            (see PLACES) has none.
    """
    module, _, name = path.rpartition(".")
    line = f"{part}._target_={path}".lstrip(".")
    if not allowed(path, allow):
        raise ConfigError(f"{line}: must lie in {', '.join([*PACKAGES, *allow])} (allow=[package])")
    found: Any = None
    try:
        found = importlib.import_module(module)
        found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{line}: not found ({error}){near(name, classes(found))}") from error
    if not isinstance(found, type) or not allowed(found.__module__, allow):
        raise ConfigError(
            f"{line}: must be a class of"
            f" {', '.join([*PACKAGES, *allow])}{near(name, classes(found))}"
        )
    if part:
        within(part, f"{found.__module__}.{found.__qualname__}", allow)
    return found


def classes(module: Any) -> list[str]:
    """The names of the classes in a module."""
    return (
        [name for name, value in vars(module).items() if isinstance(value, type)]
        if inspect.ismodule(module)
        else []
    )


def check_options(target: type, values: Mapping[str, Any], part: str) -> None:
    """
    Raises:
        ConfigError: the class does not take one of the options.
    """
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in values:
        if name not in parameters:
            key = f"{part}.{name}".lstrip(".")
            raise ConfigError(
                f"{key}: {target.__name__} takes no such option{near(name, parameters)}"
            )


def build(node: Any, allow: Iterable[str] = (), part: str = "", **extra: Any) -> Any:
    """An object of the class that `node._target_` names, made from the node's other fields and
    `extra`.

    Raises:
        ConfigError: the class is not allowed, is none of this `part`'s (see PLACES), or refuses the
            fields.
    """
    values = (
        dict(node)
        if isinstance(node, Mapping)
        else {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    )
    path = values.pop("_target_")
    target, line = resolve_target(path, allow, part), f"{part}._target_={path}".lstrip(".")
    check_options(target, values, part)
    try:
        inspect.signature(target).bind(**extra, **values)
    except TypeError as error:
        raise ConfigError(f"{line}: {error}") from error
    try:
        return target(**extra, **values)
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{line}: {error}") from error
    except (
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as error:  # of numbers beyond what memory or PyTorch can hold
        told = (str(error).splitlines() or [type(error).__name__])[0]
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        most = max(numbers, key=lambda name: numbers[name], default="")
        largest = f"; {part}.{most}={numbers[most]} is the largest of its numbers" if most else ""
        raise ConfigError(f"{line}: cannot be built ({told}){largest}") from error
