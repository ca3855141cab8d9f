"""Build objects of the classes that a configuration names (`_target_`)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from softmod.errors import ConfigError, near


def target_of(node: Any) -> str:
    """Return the dotted path in a node's `_target_`, or an empty string if there is none."""
    if isinstance(node, Mapping):
        return str(node.get("_target_", ""))
    return str(getattr(node, "_target_", ""))


def resolve_target(path: str, key: str, kind: type = object) -> type:
    """Import the class that `<key>._target_` names.

    Raises:
        ConfigError: It does not exist, is not a class, or is not a subclass of `kind`.
    """
    module, _, name = path.rpartition(".")
    line = f"{key}._target_={path}"
    found: Any = None
    try:
        found = importlib.import_module(module)
        found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{line}: not found ({error}){near(name, classes(found))}") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        wanted = "class" if kind is object else f"{kind.__module__}.{kind.__qualname__}"
        raise ConfigError(f"{line}: must be a {wanted}{near(name, classes(found))}")
    return found


def classes(module: Any) -> list[str]:
    """List the names of the classes in a module."""
    if not inspect.ismodule(module):
        return []
    return [name for name, value in vars(module).items() if isinstance(value, type)]


def check_options(target: type, values: Mapping[str, Any], key: str) -> None:
    """Check that a class accepts these options.

    Raises:
        ConfigError: The class does not accept one of them.
    """
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in values:
        if name not in parameters:
            taken = near(name, parameters)
            raise ConfigError(f"{key}.{name}: {target.__name__} takes no such option{taken}")


def build(node: Any, key: str, kind: type = object, **extra: Any) -> Any:
    """Instantiate the class that `node._target_` names with the node's other fields and `extra`.

    Args:
        node: A dataclass or a mapping.
        key: Key of the node in the configuration, for messages.
        kind: Required base class.
        **extra: Further arguments of the class.

    Raises:
        ConfigError: The class does not exist, is not a subclass of `kind`, or rejects the fields.
    """
    if isinstance(node, Mapping):
        values = dict(node)
    else:
        values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    path = values.pop("_target_")
    target = resolve_target(path, key, kind)
    line = f"{key}._target_={path}"
    check_options(target, values, key)
    try:
        inspect.signature(target).bind(**extra, **values)
    except TypeError as error:
        raise ConfigError(f"{line}: {error}") from error
    try:
        return target(**extra, **values)
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{line}: {error}") from error
    except (ArithmeticError, RuntimeError, MemoryError) as error:
        # numbers too large for memory or for PyTorch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{line}: cannot be built ({reason}){_largest(values, key)}") from error


def _largest(values: Mapping[str, Any], key: str) -> str:
    """Name the largest whole number among the values, for messages."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int)}
    if not numbers:
        return ""
    most = max(numbers, key=lambda name: numbers[name])
    return f"; {key}.{most}={numbers[most]} is the largest value given"
