"""Compose and check the configuration of a command line, without heavy imports."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache, partial
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

from softmod.config import renamed, resolvers, schema, synonyms, trust
from softmod.config.earlier import completed
from softmod.config.groups import GROUPS, conf_folder, options
from softmod.config.identity import flat
from softmod.config.messages import Names, explain, extends, not_utf8
from softmod.config.validate import check_fields, check_rules, expand_home
from softmod.errors import CheckpointError, ConfigError, listed, one_line

resolvers.register()  # now: a launcher's process resolves values before it composes anything


def register() -> None:
    """Register the schemas with Hydra."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=schema.TrainConfig)
    store.store(name="evaluate_schema", node=schema.EvaluateConfig)
    store.store(name="export_schema", node=schema.ExportConfig)
    store.store(name="report_schema", node=schema.ReportConfig)
    store.store(name="ui_schema", node=schema.UiConfig)
    store.store(group="schema/env", name="env", node=schema.EnvConfig)
    for name, node in schema.NETWORKS.items():
        store.store(group="schema/network", name=name, node=node)
    store.store(group="schema/optimizer", name="adam", node=schema.AdamConfig)
    store.store(group="schema/optimizer", name="adamw", node=schema.AdamWConfig)
    for name, node in schema.VALUE_HEADS.items():
        store.store(group="schema/critic_head", name=name, node=node)


def parse(overrides: list[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar.

    Raises:
        ConfigError: An override is not of the form key=value, adds or deletes a key, or uses a
            name that was replaced.
    """
    parsed = [read(text) for text in overrides]
    renamed.check(parsed)
    for override in parsed:
        text = str(override.input_line)
        if (
            override.type is not None
            and override.type.name != "CHANGE"
            and not re.match(r"[+~]+hydra|[+]+algorithm\.own[.=]", text)
        ):
            raise ConfigError(
                f"{text}: keys cannot be added or deleted; write key=value to change one"
                f"{synonyms.hint(override.key_or_group, keys((), 'train'))}"
            )
        group = override.key_or_group
        option = override.value()
        if group in GROUPS and not override.is_sweep_override() and type(option) not in (str, list):
            raise ConfigError(f"{text}: {group} needs an option; it has {listed(options(group))}")
        if re.fullmatch(r"[+]*hydra(/\w+|\.launcher|\.sweeper)?=null", text):
            raise ConfigError(f"{text}: must not be null")
    return parsed


def read(text: str) -> Override:
    """Parse one override with Hydra's grammar.

    Raises:
        ConfigError: It is not of the form key=value.
    """
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException as error:
        key, sign, value = text.partition("=")
        quoted = "'" + value.replace("'", "\\'") + "'"
        with suppress(HydraException):
            if (
                sign
                and not re.match(r"[\[{,=]|\w+\(|.*(,,|[,=]$)", value)
                and parser.parse_override(f"{key}={quoted}").value() == value
            ):
                typed = shell_quoted(key, quoted)
                two = "separate two overrides, or else " if "=" in value else ""
                raise ConfigError(
                    f"{text}: {two}the value needs quotes within the shell's: {typed}"
                ) from error
        why = re.sub(r"^\w+ while evaluating | expecting .*", "", str(error).splitlines()[0])
        raise ConfigError(f"{text}: not of the form key=value ({why})") from error


def shell_quoted(key: str, value: str) -> str:
    """Return an override as it is typed in a shell."""
    text = f"{key}={value}"
    if not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


@contextmanager
def hydra_of(config_dir: str | None = None) -> Iterator[Hydra]:
    """Set up Hydra with `conf/` and, if given, a folder of the user on its search path."""
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
    """Compose a configuration.

    Args:
        overrides: Overrides as on a command line.
        name: Name of the primary configuration.
        config_dir: Folder of the user, searched before `conf/`.
        hydra: Keep Hydra's own part, the key `hydra`.

    Raises:
        ConfigError: An override or a file is invalid. The message is one line with the key, the
            value, the allowed values and the nearest valid name.
    """
    register()
    parse(overrides)
    try:
        with hydra_of(config_dir) as loader:
            composed = loader.compose_config(name, overrides, RunMode.RUN, from_shell=False)
        return composed if hydra else without_hydra(composed)
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(error, config_dir)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        names = Names(partial(keys, config_dir=config_dir), name, config_dir)
        raise ConfigError(explain(error, overrides, names)) from error
    except RecursionError as error:
        raise ConfigError(
            "the defaults of a configuration file lead back to it"
            f" [{' '.join([*(['-cn', name] if name != 'train' else []), *overrides])}]"[:300]
        ) from error
    except (YAMLError, OSError) as error:
        if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd
            raise ConfigError("the working folder no longer exists; change to another") from error
        raise ConfigError(
            f"a configuration file cannot be read: {' '.join(str(error).split())}"[:300]
        ) from error


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy without the key `hydra`."""
    copied = deepcopy(composed)
    with read_write(copied), open_dict(copied):
        del copied["hydra"]
    return copied


def typed(config: DictConfig) -> Any:
    """Convert a composed configuration to dataclasses and check them.

    Raises:
        ConfigError: A value has the wrong type, is out of range, is not one of the choices, or
            breaks a rule across fields.
    """
    check_env_file(config)
    try:
        cfg = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [], Names(keys))) from error
    check_fields(cfg, "")
    expand_home(cfg, "")
    if isinstance(cfg, schema.TrainConfig):
        check_rules(cfg)
    return cfg


def check_env_file(config: DictConfig) -> None:
    """Check that the option of `env` extends one of softmod's.

    Raises:
        ConfigError: It does not.
    """
    if OmegaConf.get_type(config) is schema.TrainConfig and (
        OmegaConf.get_type(config, "env") is not schema.EnvConfig
    ):
        raise ConfigError(f"env: {extends('env')}")


def from_saved(values: Mapping[str, Any], allow: Sequence[str]) -> schema.TrainConfig:
    """Return the configuration of a saved run.

    Args:
        values: Saved values, nested.
        allow: Packages of the user whose classes the configuration may name.

    Raises:
        CheckpointError: The values are not a run's configuration.
        ConfigError: The configuration names a class that is not allowed.
    """
    known = completed(values)
    trust.check(known, allow)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema.TrainConfig), known)
        cfg: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise CheckpointError(f"not a run's configuration ({one_line(error)})") from error
    return cfg


@cache
def keys(
    overrides: tuple[str, ...], config_name: str, config_dir: str | None = None
) -> tuple[str, ...]:
    """Return all keys of a configuration, dotted."""
    composed = compose(list(overrides), config_name, config_dir)
    return tuple(flat(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]
