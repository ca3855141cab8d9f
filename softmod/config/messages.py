"""Mistakes in one line: key, value, what is allowed, the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from softmod.config import renamed
from softmod.config.groups import GROUPS, options
from softmod.errors import ConfigError, listed, near

Keys = Callable[[tuple[str, ...], str], tuple[str, ...]]  # of overrides and a configuration's name


def explain(error: BaseException, overrides: list[str], keys: Keys, name: str = "train") -> str:
    """Return key, value, what is allowed and the nearest valid name, in one line.

    Args:
        error: what Hydra or OmegaConf raised.
        overrides: of the command line.
        keys: composes a configuration of this name with some overrides; its keys, dotted.
        name: of the configuration.
    """
    cause: BaseException = error
    while isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    line, *more = (str(cause).strip() or type(cause).__name__).splitlines()
    line += f" {more[0]}" if more and line.endswith(":") else ""
    if f"{ConfigError.__name__} raised while" in line:  # by a resolver of ours: complete as it is
        return plainly(line)
    text = plainly(line)
    about = str(getattr(cause, "full_key", None) or "")
    for override in reversed(overrides):  # of two for the same key, the last one counts
        others = [other for other in overrides if other != override]
        if found := explain_override(override, others, f"{error}\n", about, text, keys, name):
            return found
    return (f"{about}: {text}" if about and about not in text else text) + renamed.hint(
        f"{error}\n"
    )


WANTED = {
    "Integer": "a whole number",
    "Float": "a number",
    "bool": "true or false",
    "Boolean": "true or false",
}


MOUNTED = {
    "network": ("network@actor", "network@critic"),
    "optimizer": ("optimizer@optimizer.actor",),
}


def plainly(text: str) -> str:
    """Rephrase OmegaConf's message about a value of the wrong type for the command line."""
    if "is not a ListConfig" in text:
        return "must be a list, as in [a,b]"
    if "raised while resolving interpolation: " in text:
        return text.partition("raised while resolving interpolation: ")[2]
    if "is not Optional" in text:
        return "must not be null"
    kind = re.search(r"(?:could not be converted to|is not a valid) (\w+)", text)
    return f"must be {WANTED[kind[1]]}" if kind and kind[1] in WANTED else text


def explain_override(
    override: str,
    overrides: list[str],
    message: str,
    about: str,
    text: str,
    keys: Keys,
    config_name: str,
) -> str | None:
    """A line about this override, if the error is about it; `overrides` are the others."""
    key, _, value = override.partition("=")
    group = key.split("@")[0]
    missing = re.escape(f"{group}/{value.strip('[]')}")
    if group in GROUPS and re.search(f"Could not (find|load) '{missing}'", message):
        names = options(group)
        return (
            f"{override}: {group} has no option {value}; it has"
            f" {listed(names, value)}{near(value, names)}"
        )
    unknown = ("is not in struct" in text or "not in '" in text) and not text.startswith(
        "In '"
    )  # a file
    if f"Could not override '{key}'" in message or (
        unknown and (about == "" or key.startswith(about))
    ):
        nearest = nearest_key(key, overrides, keys, config_name)
        return f"{override}: there is no key or group {key}{nearest}"
    if about == key:
        return f"{override}: {text}"
    return None


def nearest_key(key: str, overrides: list[str], keys: Keys, config_name: str) -> str:
    """Suggest the key that was meant, or else list the keys beside it."""
    if key in MOUNTED:
        return f"; did you mean {' or '.join(MOUNTED[key])}?"
    if "@" in key or "." not in key:
        words = {name.split(".")[0] for name in keys((), config_name)}
        if config_name == "train":
            words |= {*GROUPS, "network@actor", "network@critic"}
        return near(key, sorted(word for word in words if ("@" in word) == ("@" in key)))
    try:
        known = keys(tuple(overrides), config_name)
    except ConfigError:  # more than one override is wrong
        known = keys_of_groups(overrides, keys, config_name)
    parent, _, name = key.rpartition(".")
    names = [word.removeprefix(f"{parent}.") for word in known if word.startswith(f"{parent}.")]
    if close := near(name, names):
        return close.replace("did you mean ", f"did you mean {parent}.")
    return (
        f"; {parent} has {', '.join(n for n in names if n != '_target_')}"
        if names
        else near(key, known)
    )


def keys_of_groups(overrides: list[str], keys: Keys, config_name: str) -> tuple[str, ...]:
    """The keys that there are by the groups among the overrides, as far as these are valid."""
    chosen = tuple(
        override for override in overrides if override.partition("=")[0].split("@")[0] in GROUPS
    )
    try:
        return keys(chosen, config_name)
    except ConfigError:
        return keys((), config_name)
