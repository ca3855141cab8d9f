"""From a command line to a checked configuration, without importing anything heavy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from softmod.config import renamed, resolvers, schema, trust
from softmod.config.earlier import completed
from softmod.config.groups import GROUPS, conf_folder, options
from softmod.config.identity import flat
from softmod.config.messages import explain
from softmod.config.validate import check_fields, check_rules, expand_home
from softmod.errors import CheckpointError, ConfigError, listed, one_line


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
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException as error:
        key, sign, value = text.partition("=")
        quoted = "'" + value.replace("'", "\\'") + "'"
        with suppress(HydraException):
            if sign and parser.parse_override(f"{key}={quoted}").value() == value:
                typed = shell_quoted(key, quoted)
                raise ConfigError(
                    f"{text}: the value needs quotes within the shell's: {typed}"
                ) from error
        raise ConfigError(
            f"{text}: not of the form key=value ({str(error).splitlines()[0]})"
        ) from error


def shell_quoted(key: str, value: str) -> str:
    """Return an override as it is typed in a shell."""
    text = f"{key}={value}"
    if not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


@contextmanager
def hydra_of(config_dir: str | None = None) -> Iterator[Hydra]:
    """Set up Hydra on `conf/`, and on a folder of the user's own beside it."""
    register()
    version.setbase("1.3")
    path = create_config_search_path(str(conf_folder()))
    if config_dir:
        own = f"file://{Path(config_dir).resolve()}"
        path.prepend("command-line", own, anchor=SearchPathQuery(provider="schema"))
    instance = GlobalHydra.instance()
    before = instance.hydra  # of a program that calls softmod from a Hydra application of its own
    instance.clear()
    try:
        yield Hydra.create_main_hydra2(task_name="train", config_search_path=path)
    finally:
        instance.clear()
        instance.hydra = before


def compose(
    overrides: list[str], name: str = "train", config_dir: str | None = None, hydra: bool = False
) -> DictConfig:
    """Compose a configuration; with `hydra`, Hydra's own part of it too.

    Args:
        overrides: as on a command line.
        name: of the configuration that the others are chosen in.
        config_dir: a folder of the user's own beside `conf/`.
        hydra: whether the key `hydra` is wanted.

    Raises:
        ConfigError: with key, value, what is allowed and the nearest valid name, in one line.
    """
    register()
    parse(overrides)
    try:
        with hydra_of(config_dir) as loader:
            composed = loader.compose_config(name, overrides, RunMode.RUN, from_shell=False)
        return composed if hydra else without_hydra(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides, keys, name)) from error
    except (YAMLError, RecursionError, OSError) as error:
        raise ConfigError(
            f"a file of the configuration is unreadable: {' '.join(str(error).split())}"[:300]
        ) from error


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy without Hydra's own part."""
    copied = deepcopy(composed)
    with read_write(copied), open_dict(copied):
        del copied["hydra"]
    return copied


def typed(config: DictConfig) -> Any:
    """Return the dataclasses that a composed configuration stands for, checked.

    Raises:
        ConfigError: a type, a range, a choice or a rule across fields is broken.
    """
    resolvers.register()  # a launcher's process has composed nothing itself
    try:
        cfg = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [], keys)) from error
    check_fields(cfg, "")
    expand_home(cfg)
    if isinstance(cfg, schema.TrainConfig):
        check_rules(cfg)
    return cfg


def from_saved(values: Mapping[str, Any], allow: Sequence[str]) -> schema.TrainConfig:
    """Return the configuration of a saved run.

    Args:
        values: as they were saved.
        allow: packages of the user's own that it may name classes of.

    Raises:
        CheckpointError: it is none of a run.
        ConfigError: it names a class that is not allowed.
    """
    known = completed(values)
    trust.check(known, allow)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema.TrainConfig), known)
        cfg: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise CheckpointError(f"no configuration of a run ({one_line(error)})") from error
    return cfg


@cache
def keys(overrides: tuple[str, ...], config_name: str) -> tuple[str, ...]:
    """Every key of a configuration, dotted."""
    composed = compose(list(overrides), config_name)
    return tuple(flat(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]
