"""From a command line to a checked configuration, without importing anything heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from softmod.config.groups import GROUPS, conf_folder, options
from softmod.config.identity import flat
from softmod.config.messages import explain
from softmod.config.validate import check_fields, check_rules
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
        raise ConfigError(explain(error, overrides, keys, name)) from error
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
        raise ConfigError(explain(error, [], keys)) from error
    check_fields(cfg, "")
    if isinstance(cfg, schema.TrainConfig):
        check_rules(cfg)
    return cfg


def from_saved(values: Mapping[str, Any], allow: Sequence[str]) -> schema.TrainConfig:
    """The configuration of a saved run; which packages it may name is for the caller to say.

    Raises:
        CheckpointError: it is none of a run.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema.TrainConfig), dict(values), {"allow": list(allow)}
        )
        cfg: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise CheckpointError(f"no configuration of a run ({one_line(error)})") from error
    return cfg


@cache
def keys(overrides: tuple[str, ...], config_name: str) -> tuple[str, ...]:
    """Every key of a configuration, dotted."""
    composed = compose(list(overrides), config_name)
    return tuple(flat(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]
