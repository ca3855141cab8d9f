"""`--help`: the groups with their options, and the keys that people type."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from softmod.config import schema
from softmod.config.compose import compose
from softmod.config.groups import GROUPS, options

SECTIONS: tuple[tuple[str, Any, str], ...] = (  # title, schema, key
    ("", schema.TrainConfig, ""),
    ("env.", schema.EnvConfig, "env"),
    ("actor. (and critic., which is residual)", schema.SoftModularConfig, "actor"),
    ("policy.", schema.PolicyConfig, "policy"),
    ("critic_head.", schema.CategoricalConfig, "critic_head"),
    ("algorithm.", schema.AlgorithmConfig, "algorithm"),
    ("optimizer.actor. (critic., temperature.)", schema.AdamWConfig, "optimizer.actor"),
    ("run.", schema.RunConfig, "run"),
    ("workers.", schema.WorkersConfig, "workers"),
    ("fabric.", schema.FabricConfig, "fabric"),
    ("tracking.", schema.TrackingConfig, "tracking"),
)
ABOUT = {
    "env": "task sets (python -m softmod.envs lists the tasks)",
    "network": "networks, chosen for network@actor and network@critic",
    "model": "the networks of actor and critic",
    "critic_head": "what the critics predict: a value, or a distribution over values",
    "algorithm": "the update and its optimizers: fast is the default recipe, mtsac as published",
    "optimizer": (
        "chosen for optimizer@optimizer.actor, optimizer@optimizer.critic and"
        " optimizer@optimizer.temperature"
    ),
    "variant": (
        "one difference between the paper and its released code, or a part left out of the recipe"
    ),
    "run": (
        "how long: steps, batch, replay, cadences; recipe suits any task set, paper is the"
        " published protocol"
    ),
    "experiment": "a row of a results table: selects options of the groups above",
    "sweep": "ablations: several runs under one parent",
}


def text() -> str:
    """Return the whole help."""
    default = compose([])
    groups = [f"  {group:<12}{', '.join(options(group))}{_about(group)}" for group in GROUPS]
    return "\n".join(
        [
            "softmod-train: train one policy on many robot tasks with soft modularization",
            "",
            (
                "usage: python -m softmod.train [GROUP=OPTION ...] [KEY=VALUE ...] [-m] [--cfg job]"
                " [--config-dir DIR]"
            ),
            "",
            "  python -m softmod.train                                     the quickstart",
            "  python -m softmod.train env=mt10 model=soft_modular seed=3",
            (
                "  python -m softmod.train env=mt50 model=moore run=smoke         a minute to see"
                " it run"
            ),
            (
                "  python -m softmod.train experiment=paper_mt10 model=care   the published"
                " protocol: 2 M steps per task"
            ),
            (
                "  python -m softmod.train -m env=quickstart seed=0,1,2"
                " model=soft_modular_small,mt_sac"
            ),
            "",
            (
                "The same command again goes on where the run stopped. -m: every combination, one"
                " after another, under one"
            ),
            (
                "parent run. --cfg job: print the resolved configuration. --config-dir: a folder of"
                " your own beside conf/."
            ),
            "",
            "Groups and their options:",
            *groups,
            "",
            "Keys, with their values in the default configuration:",
            *(line for section in SECTIONS for line in _keys(*section, default)),
            "",
            (
                "Exit codes: 0 done, 2 configuration, 3 no valid checkpoint, 4 cannot save, 5"
                " environment failure,"
            ),
            "6 numerical failure, 130 Ctrl-C, 143 SIGTERM or SIGUSR1.",
        ]
    )


def _about(group: str) -> str:
    return f"\n{'':<14}({ABOUT[group]})" if group in ABOUT else ""


def _keys(title: str, kind: Any, key: str, default: DictConfig) -> list[str]:
    """Return a line for each key of a group: its value in the default configuration, and what it
    is.
    """
    comments = field_comments(kind)
    values = OmegaConf.select(default, key) if key else default
    lines = [f"  {title}"] if title else []
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if field.name.startswith("_") or isinstance(value, DictConfig):
            continue
        shown = value_text(value)
        about = [comments[field.name]] if field.name in comments else []
        if "choices" in field.metadata:
            about.append(f"one of {', '.join(field.metadata['choices'])}")
        lines.append(f"    {field.name:<26}{shown:<16}{'; '.join(about)}".rstrip())
    return lines


def value_text(value: Any) -> str:
    """Return a value as it is typed."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def field_comments(kind: Any) -> dict[str, str]:
    """Return the comment at each field of a schema, or on the line above it."""
    comments: dict[str, str] = {}
    above = ""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("#")
        name, colon, _ = code.partition(":")
        if colon and (comment or above):
            comments[name.strip()] = comment.strip() or above
        above = comment.strip() if not code.strip() else ""
    return comments
