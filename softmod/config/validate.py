"""Checks of a configuration's values: ranges, choices, and rules across fields."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from softmod.config import schema
from softmod.config.instantiate import target_of
from softmod.errors import ConfigError, near


def check_fields(node: Any, key: str) -> None:
    """Check ranges and choices of a dataclass and of nested ones.

    Raises:
        ConfigError: A value is out of range or not one of the choices.
    """
    if not dataclasses.is_dataclass(node):
        return
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = f"{key}.{field.name}".lstrip(".")
        check_fields(value, name)
        check_choice(name, value, field.metadata.get("choices"))
        if value is not None and "low" in field.metadata:
            check_range(name, value, **field.metadata)


def expand_home(node: Any, key: str) -> None:
    """Replace `~` in the paths of a dataclass and of those within it.

    Raises:
        ConfigError: A path begins with the name of an unknown user or of a variable.
    """
    if not dataclasses.is_dataclass(node):
        return
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = f"{key}.{field.name}".lstrip(".")
        expand_home(value, name)
        if field.metadata.get("path"):
            setattr(node, field.name, expanded(value, name))


def expanded(value: Any, name: str) -> Any:
    """Return a path, or each of a list of paths, with the user's home folder for `~`.

    Raises:
        ConfigError: It begins with the name of an unknown user or of a variable.
    """
    if isinstance(value, list):
        return [expanded(each, name) for each in value]
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    first = path.partition("/")[0]
    if path.startswith("~"):
        raise ConfigError(f"{name}={value}: there is no user {first[1:]}; or type ./{path}")
    if path.startswith("$"):
        raise ConfigError(
            f"{name}={value}: {first} was not replaced by its value; leave out the single quotes"
            f" in a shell, type ~ for the home folder, or ./{path}"
        )
    return path


def check_choice(name: str, value: Any, choices: Iterable[str] | None) -> None:
    """Check that a value, or each of a list, is one of its choices, if it has any.

    Raises:
        ConfigError: It is not.
    """
    for one in value if isinstance(value, list) else [value]:
        if choices is not None and one not in choices:
            raise ConfigError(
                f"{name}={one}: must be one of {', '.join(choices)}{near(str(one), choices)}"
            )


def check_range(
    name: str, value: float, low: float | None, high: float | None, open_low: bool
) -> None:
    """Check that a number is finite and within [low, high]; `open_low` excludes `low`.

    Raises:
        ConfigError: It is not.
    """
    too_low = low is not None and (value < low or (open_low and value == low))
    if too_low or (high is not None and value > high) or not math.isfinite(value):
        above = "finite" if low is None else f"above {low:g}" if open_low else f"at least {low:g}"
        above += " and finite" if value == math.inf and low is not None else ""
        allowed = f"in {'(' if open_low else '['}{low:g}, {high:g}]" if high is not None else above
        raise ConfigError(f"{name}={value}: must be {allowed}")


def check_rules(cfg: schema.TrainConfig) -> None:
    """Check the rules across fields.

    Raises:
        ConfigError: A rule is broken.
    """
    check_env(cfg)
    check_seeds(cfg)
    run = cfg.run
    if run.batch_per_task > run.replay_per_task:
        raise ConfigError(
            f"run.batch_per_task={run.batch_per_task}: larger than"
            f" run.replay_per_task={run.replay_per_task}"
        )
    if run.warmup_per_task > run.replay_per_task:
        raise ConfigError(
            f"run.warmup_per_task={run.warmup_per_task}: larger than"
            f" run.replay_per_task={run.replay_per_task}"
        )
    name = "horizon"
    steps = cfg.env.horizon
    if cfg.env.train_horizon is not None:
        name = "train_horizon"
        steps = cfg.env.train_horizon
    if steps > cfg.env.horizon:
        raise ConfigError(
            f"env.train_horizon={steps}: must be at most env.horizon={cfg.env.horizon}"
        )
    if steps % run.round_steps:
        raise ConfigError(f"run.round_steps={run.round_steps}: must divide env.{name}={steps}")
    if cfg.algorithm.reward_scaling == "return" and cfg.algorithm.discount == 1.0:
        raise ConfigError(
            "algorithm.discount=1.0: must be below 1 with algorithm.reward_scaling=return"
        )
    if cfg.algorithm.policy_delay > 1 and cfg.algorithm.update_order == "released":
        raise ConfigError(
            f"algorithm.policy_delay={cfg.algorithm.policy_delay}: only with"
            " algorithm.update_order=sequential"
        )
    per_graph = cfg.fabric.updates_per_graph
    if per_graph and per_graph % cfg.algorithm.policy_delay:
        raise ConfigError(
            f"fabric.updates_per_graph={per_graph}: must be a multiple of"
            f" algorithm.policy_delay={cfg.algorithm.policy_delay}"
        )
    if not plain(cfg.name):
        shown = cfg.name if cfg.name.isprintable() else ascii(cfg.name)
        raise ConfigError(f"name={shown:.100}: must be a plain folder name, of at most 200 bytes")
    check_targets(cfg)
    for name in ("actor", "critic", "temperature"):
        betas = getattr(getattr(cfg.optimizer, name), "betas", [0.0, 0.0])
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"optimizer.{name}.betas={betas}: must be two numbers in [0, 1)")


def check_seeds(cfg: schema.TrainConfig) -> None:
    """Check that `seeds`, if given, are distinct and not negative."""
    if cfg.seeds is None:
        return
    line = f"seeds=[{','.join(map(str, cfg.seeds))}]"
    if not cfg.seeds or min(cfg.seeds) < 0 or len(set(cfg.seeds)) < len(cfg.seeds):
        raise ConfigError(
            f"{line:.150}: must be distinct numbers of at least 0, as in seeds=[0,1,2]"
        )


def plain(name: str) -> bool:
    """Return whether a name is a valid folder name on any file system."""
    return (
        0 < len(name.encode(errors="replace")) <= 200
        and name.isprintable()
        and not set(name) & set("/\\")
    )


def check_env(cfg: schema.TrainConfig) -> None:
    """Check the task set: its name, its tasks and their reward version."""
    from softmod.envs.tasks import MT50, TOY_TASKS, check_tasks

    known = {"softmod.envs.metaworld.MetaWorld": MT50, "softmod.envs.toy.Toy": TOY_TASKS}.get(
        cfg.env._target_
    )
    if not cfg.env.name:
        raise ConfigError("env.name=: must not be empty")
    if not cfg.env.tasks:
        raise ConfigError(
            "env.tasks=[]: name at least one task (python -m softmod.envs lists them)"
        )
    if known is not None:
        check_tasks(cfg.env.tasks, known)
    if known is TOY_TASKS and cfg.env.reward != "v2":
        raise ConfigError(f"env.reward={cfg.env.reward}: must be v2 for the toy tasks")


def check_targets(cfg: schema.TrainConfig) -> None:
    """Check that every `_target_` is the dotted path of a class."""
    nodes = {
        "env": cfg.env,
        "actor": cfg.actor,
        "critic": cfg.critic,
        "critic_head": cfg.critic_head,
    }
    nodes["algorithm"] = cfg.algorithm
    nodes |= {
        f"optimizer.{name}": getattr(cfg.optimizer, name)
        for name in ("actor", "critic", "temperature")
    }
    nodes |= {f"callbacks.{number}": node for number, node in enumerate(cfg.callbacks)}
    for key, node in nodes.items():
        path = target_of(node)
        if not path:
            raise ConfigError(
                f"{key}._target_: no value given; it names the class to build, as in"
                " {_target_: package.module.Class}"
            )
        if not re.fullmatch(r"([a-z_]\w*\.)+[A-Z]\w*", path):
            raise ConfigError(
                f"{key}._target_={path}: must name a class, as in package.module.Class"
            )
