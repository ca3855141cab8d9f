"""From a command line to a checked configuration, without importing anything heavy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from softmod.config import renamed, resolvers, schema
from softmod.config.validate import check_fields, check_rules
from softmod.errors import ConfigError, listed, near

GROUPS = (
    "env",
    "model",
    "network",
    "critic_head",
    "algorithm",
    "optimizer",
    "run",
    "workers",
    "fabric",
    "tracking",
    "experiment",
    "variant",
    "sweep",
)
NOT_RESULTS = {
    "": ("seed", "seeds", "name", "allow", "tracking", "published_task_weights"),
    "env": ("fast",),
    "run": ("steps_per_task", "max_minutes", "stop_at", "resume", "folder", "eval_every",
            "eval_goals",
            "final_eval_goals", "save_every", "log_every"),
    "workers": ("processes", "timeout"),
    "fabric": ("accelerator", "threads", "compile", "kernels", "deterministic"),
}  # fmt: skip


def conf_folder() -> Path:
    """`conf/` beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """The options of a group, from the files of `conf/`."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def register() -> None:
    """Register the schemas with Hydra, the resolvers with OmegaConf."""
    resolvers.register()
    store = ConfigStore.instance()
    store.store(name="train_schema", node=schema.TrainConfig)
    store.store(name="evaluate_schema", node=schema.EvaluateConfig)
    store.store(name="report_schema", node=schema.ReportConfig)
    store.store(group="schema/env", name="env", node=schema.EnvConfig)
    for name, node in schema.NETWORKS.items():
        store.store(group="schema/network", name=name, node=node)
    store.store(group="schema/optimizer", name="adam", node=schema.AdamConfig)
    store.store(group="schema/optimizer", name="adamw", node=schema.AdamWConfig)
    for name, node in schema.VALUE_HEADS.items():
        store.store(group="schema/critic_head", name=name, node=node)


def parse(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra reads them.

    Raises:
        ConfigError: one is not of the form key=value, or adds or deletes a key.
    """
    parsed = [read(text) for text in overrides]
    renamed.check(parsed)
    for override in parsed:
        text = str(override.input_line)
        if (
            override.type is not None
            and override.type.name != "CHANGE"
            and not text.lstrip("+~").startswith("hydra")
        ):
            raise ConfigError(
                f"{text}: keys are changed by key=value, none can be added or deleted"
            )
        group = override.key_or_group
        if group in GROUPS and not override.is_sweep_override() and override.value() is None:
            raise ConfigError(f"{text}: {group} needs an option; it has {listed(options(group))}")
    return parsed


def read(text: str) -> Override:
    """An override as Hydra reads it.

    Raises:
        ConfigError: it is not of the form key=value.
    """
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"{text}: not of the form key=value ({str(error).splitlines()[0]})"
        ) from error


def compose(
    overrides: list[str], name: str = "train", config_dir: str | None = None, hydra: bool = False
) -> DictConfig:
    """The configuration that these overrides make; with `hydra`, Hydra's own part too.

    Raises:
        ConfigError: with key, value, what is allowed and the nearest valid name, in one line.
    """
    register()
    parse(overrides)
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return hydra_compose(name, overrides=overrides + extra, return_hydra_config=hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides, name)) from error
    except (YAMLError, RecursionError, OSError) as error:
        raise ConfigError(
            f"a file of the configuration is unreadable: {' '.join(str(error).split())}"[:300]
        ) from error
    finally:
        GlobalHydra.instance().clear()


def typed(config: DictConfig) -> Any:
    """The dataclasses that a composed configuration stands for, checked.

    Raises:
        ConfigError: a type, a range, a choice or a rule across fields is broken.
    """
    resolvers.register()  # a launcher's process has composed nothing itself
    try:
        cfg = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [])) from error
    check_fields(cfg, "")
    if isinstance(cfg, schema.TrainConfig):
        check_rules(cfg)
    return cfg


# --- what Hydra and OmegaConf say, in one line ----------------------------------------------------


def explain(error: BaseException, overrides: list[str], name: str = "train") -> str:
    """Key, value, what is allowed, the nearest valid name."""
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
        if found := explain_override(override, others, f"{error}\n", about, text, name):
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
    override: str, overrides: list[str], message: str, about: str, text: str, config_name: str
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
        return (
            f"{override}: there is no key or group {key}{nearest_key(key, overrides, config_name)}"
        )
    if about == key:
        return f"{override}: {text}"
    return None


def nearest_key(key: str, overrides: list[str], config_name: str) -> str:
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
        known = keys_of_groups(overrides, config_name)
    parent, _, name = key.rpartition(".")
    names = [word.removeprefix(f"{parent}.") for word in known if word.startswith(f"{parent}.")]
    if close := near(name, names):
        return close.replace("did you mean ", f"did you mean {parent}.")
    return (
        f"; {parent} has {', '.join(n for n in names if n != '_target_')}"
        if names
        else near(key, known)
    )


def keys_of_groups(overrides: list[str], config_name: str) -> tuple[str, ...]:
    """The keys that there are by the groups among the overrides, as far as these are valid."""
    chosen = tuple(
        override for override in overrides if override.partition("=")[0].split("@")[0] in GROUPS
    )
    try:
        return keys(chosen, config_name)
    except ConfigError:
        return keys((), config_name)


@cache
def keys(overrides: tuple[str, ...], config_name: str) -> tuple[str, ...]:
    """Every key of a configuration, dotted."""
    composed = compose(list(overrides), config_name)
    return tuple(flat(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


# --- identity -------------------------------------------------------------------------------------


def as_values(cfg: schema.TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(cfg)


def of_results(cfg: schema.TrainConfig) -> dict[str, Any]:
    """Everything that changes results, except the seed."""
    values = as_values(cfg)
    for part, names in NOT_RESULTS.items():
        node = values[part] if part else values
        for name in names:
            node.pop(name)
    return values


def identity(cfg: schema.TrainConfig) -> str:
    """A hash of everything that changes results, except the seed: two runs with one identity can be
    compared.
    """
    return hashlib.sha256(json.dumps(of_results(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(cfg: schema.TrainConfig) -> Path:
    """`runs/<name>-<identity>/seed_<seed>`"""
    return Path(cfg.run.folder) / f"{cfg.name}-{identity(cfg)}" / f"seed_{cfg.seed}"
