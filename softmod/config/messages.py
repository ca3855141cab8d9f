"""One-line messages for invalid overrides: key, value, allowed values, nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from softmod.config import renamed, synonyms
from softmod.config.groups import GROUPS, options
from softmod.errors import ConfigError, listed, near

# maps overrides and the name of a configuration to its keys, dotted
Keys = Callable[[tuple[str, ...], str], tuple[str, ...]]


@dataclass(frozen=True)
class Names:
    """Names to compare a mistyped one with.

    Args:
        keys: Function that lists the keys of a configuration composed with given overrides.
        config: Name of the primary configuration.
        config_dir: Folder of the user, searched before `conf/`.
    """

    keys: Keys
    config: str = "train"
    config_dir: str | None = None

    def of_groups(self, overrides: list[str]) -> tuple[str, ...]:
        """List the keys of the configuration that the groups among the overrides select.

        If a choice is invalid, list the keys of the default configuration.
        """
        chosen = tuple(
            override for override in overrides if override.partition("=")[0].split("@")[0] in GROUPS
        )
        try:
            return self.keys(chosen, self.config)
        except ConfigError:
            return self.keys((), self.config)


def explain(error: BaseException, overrides: list[str], names: Names) -> str:
    """Explain an error of Hydra or OmegaConf in one line.

    Args:
        error: Exception raised by Hydra or OmegaConf.
        overrides: Overrides of the command line.
        names: Names to compare a mistyped one with.

    Returns:
        The key, its value, the allowed values and the nearest valid name.
    """
    cause: BaseException = error
    while isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    line, *more = (str(cause).strip() or type(cause).__name__).splitlines()
    line += f" {more[0]}" if more and line.endswith(":") else ""
    if f"{ConfigError.__name__} raised while" in line:  # our resolvers' messages are complete
        return plainly(line)
    text = plainly(line)
    full_key = str(getattr(cause, "full_key", None) or "")
    if "missing mandatory value" in text:
        group = full_key.partition(".")[0].replace("policy", "algorithm")
        return f"{full_key}: no value given{f'; {extends(group)}' if group in BASES else ''}"
    for override in reversed(overrides):  # the last override of a key wins
        others = [other for other in overrides if other != override]
        if found := explain_override(override, others, f"{error}\n", full_key, text, names):
            return found
    if found := explain_file(f"{error}\n", text, names):
        return found
    if full_key and full_key not in text:
        text = f"{full_key}: {text}"
    return text + renamed.hint(f"{error}\n")


def explain_file(message: str, text: str, names: Names) -> str | None:
    """Explain an error if a configuration file caused it.

    Args:
        message: The whole message of Hydra.
        text: The cause, rephrased.
        names: Names to compare a mistyped one with.

    Returns:
        The explanation, or None if no file caused the error.
    """
    if renamed.hint(message):
        return None
    twice = re.search(r"Multiple values for \S+\. To .*'override (?:schema/)?(.+): (.+)'", message)
    if twice:
        return (
            f"{twice[1]}={twice[2]}: {twice[1]} is selected twice; name one option, and in a file"
            f" write override /{twice[1]}: {twice[2]}"
        )
    missing = re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", message)
    if missing and missing[1].startswith("hydra/") and missing[2] in EXTRAS:
        return f"{missing[1]}={missing[2]}: requires pip install {EXTRAS[missing[2]]}"
    if missing and missing[1].startswith("hydra/"):
        there = sorted({*options(missing[1], names.config_dir), *hydra_options(missing[1])})
        search = "; python -m softmod.search searches" if missing[1] == "hydra/sweeper" else ""
        return (
            f"{missing[1]}={missing[2]}: {missing[1]} has no option {missing[2]}; it has"
            f" {listed(there, missing[2])}{near(missing[2], there) or search}"
        )
    if missing and missing[1] in GROUPS:
        there = options(missing[1], names.config_dir)
        return (
            f"a configuration file selects {missing[1]}={missing[2]}: {missing[1]} has no option"
            f" {missing[2]}; it has {listed(there, missing[2])}{near(missing[2], there)}"
        )
    place = re.match(r"In '([^']+)': ", message)
    if place is None or names.config_dir is None:
        return None
    file = f"{place[1]}.yaml"
    of_train = replace(names, config="train")  # the file may be the primary configuration
    if place[1].partition("/")[0] in GLOBAL and (wrong := header(Path(names.config_dir, file))):
        return f"{file}: {wrong}"
    if group := re.search(r"Could not override '([^']+)'", message):
        return f"{file}: there is no group {group[1]}{near(group[1].strip('/'), GROUPS)}"
    key = re.search(r"full_key: (\S+)", message)
    if key is None:
        return None
    if dotted := re.search(r"Key '(\w+)\.([\w.]+)' (not in|is not in)", message):
        inner = dotted[2].replace(".", ": {") + ": ..." + "}" * dotted[2].count(".")
        return f"{file}: there is no key {key[1]}; write {dotted[1]}: {{{inner}}}"
    if re.search(r"Key '[^']+' (not in|is not in)", message):
        return f"{file}: there is no key {key[1]}{nearest_key(key[1], [], of_train)}"
    value = re.search(r"Value '([^']*)' of type", message)
    return f"{file}: {key[1]}{f'={value[1]}' if value else ''}: {text}"


BASES = {  # an option of each group that a file of the user has to extend
    "env": "mt1",
    "algorithm": "fast",
    "run": "recipe",
    "workers": "auto",
    "fabric": "auto",
    "tracking": "mlflow",
}
# groups of files that set keys of other groups
GLOBAL = ("experiment", "model", "algorithm", "variant", "sweep")


def extends(group: str) -> str:
    """Return how a file of the user begins that is an option of this group."""
    return f"begin your option file of {group} with defaults: [{BASES[group]}, _self_]"


def header(path: Path) -> str:
    """Return what is wrong with the first line of a file of the groups `GLOBAL`, if anything."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("\ufeff"):
        return "must not begin with a byte order mark (BOM)"
    right = re.match(r"\s*#\s*@package\s+_global_\s", text)
    return "" if right else "its first line must be # @package _global_"


def not_utf8(error: UnicodeDecodeError, folder: str | None) -> str:
    """Name the file of a folder of the user that is not encoded in UTF-8."""
    files = Path(folder).rglob("*.yaml") if folder else ()
    wrong = [path for path in files if path.is_file() and error.object in path.read_bytes()]
    return f"{wrong[0] if wrong else 'a configuration file'}: must be encoded in UTF-8"


EXTRAS = {  # options of Hydra that packages of their own add
    "colorlog": "hydra-colorlog",
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
WANTED = {
    "Integer": "a whole number",
    "Float": "a number",
    "bool": "true or false",
    "Boolean": "true or false",
}


def hydra_options(group: str) -> list[str]:
    """List the options of a group of Hydra and of its installed plugins."""
    files = [str(path) for path in (Path(hydra.__file__).parent / "conf" / group).glob("*.yaml")]
    with suppress(OSError):  # no plugin has options of this group
        files += ConfigStore.instance().list(group)
    return [Path(name).stem for name in files]


OPEN = r"(algorithm\.own|hydra\.sweeper\.params)(\.|$)"  # keys that take any others
MOUNTED = {
    "network": ("network@actor", "network@critic"),
    "optimizer": ("optimizer@optimizer.actor",),
}


def plainly(text: str) -> str:
    """Rephrase OmegaConf's message about a value of the wrong type."""
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
    full_key: str,
    text: str,
    names: Names,
) -> str | None:
    """Explain an error if this override caused it.

    Args:
        override: The override in question.
        overrides: All other overrides.
        message: The whole message of Hydra.
        full_key: Key that the error names, or an empty string.
        text: The cause, rephrased.
        names: Names to compare a mistyped one with.

    Returns:
        The explanation, or None if the override did not cause the error.
    """
    key, _, value = override.partition("=")
    group = key.split("@")[0]
    missing = re.escape(f"{group}/{value.strip('[]')}")
    if group in GROUPS and re.search(f"Could not (find|load) '{missing}'", message):
        there = options(group, names.config_dir)
        own = f'; for this task: env=mt1 "env.tasks=[{value}]"' if is_task(group, value) else ""
        if names.config_dir and Path(names.config_dir, group, f"{value}.yml").is_file():
            own = f"; rename {group}/{value}.yml to {value}.yaml"
        return (
            f"{override}: {group} has no option {value}; it has"
            f" {listed(there, value)}{own or near(value, there)}"
        )
    in_a_file = text.startswith("In '")
    unknown = ("is not in struct" in text or "not in '" in text) and not in_a_file
    if f"Could not override '{key}'" in message and re.match(OPEN, key):
        return f"{override}: keys are added here; write +{override}"
    if f"Could not override '{key}'" in message or (
        unknown and (full_key == "" or key.startswith(full_key))
    ):
        nearest = nearest_key(key, overrides, names)
        return f"{override}: there is no key or group {key}{nearest}"
    if full_key == key:
        return f"{override}: {text}"
    return None


def is_task(group: str, value: str) -> bool:
    """Return whether a value of `env` is the name of a Meta-World task."""
    from softmod.envs.tasks import MT50

    return group == "env" and value in MT50


def nearest_key(key: str, overrides: list[str], names: Names) -> str:
    """Suggest the key that was meant, or list the keys of the same group."""
    if key in MOUNTED:
        return f"; did you mean {' or '.join(MOUNTED[key])}?"
    known = names.of_groups(overrides)
    if hint := synonyms.hint(key, known):
        return hint
    if "@" in key or "." not in key:
        words = {name.split(".")[0] for name in known}
        if names.config == "train":
            words |= {*GROUPS, "network@actor", "network@critic"}
        return near(key, sorted(word for word in words if ("@" in word) == ("@" in key)))
    parent, _, name = key.rpartition(".")
    beside = [word.removeprefix(f"{parent}.") for word in known if word.startswith(f"{parent}.")]
    if close := near(name, beside):
        return close.replace("did you mean ", f"did you mean {parent}.")
    if beside:
        others = [name for name in beside if name != "_target_"]
        return f"; {parent} has {', '.join(others) or 'no keys to set'}"
    return near(key, known)
