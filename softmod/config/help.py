"""`--help`: the groups with their options, and the keys that people type.

Reads `conf/` and the schemas only.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from softmod.config import schema
from softmod.config.groups import GROUPS, options

SECTIONS: dict[str, Any] = {
    "": schema.TrainConfig,
    "env.": schema.EnvConfig,
    "actor. (and critic.)": schema.SoftModularConfig,
    "policy.": schema.PolicyConfig,
    "critic_head. (categorical)": schema.CategoricalConfig,
    "algorithm.": schema.AlgorithmConfig,
    "optimizer.actor. (critic., temperature.)": schema.AdamWConfig,
    "run.": schema.RunConfig,
    "workers.": schema.WorkersConfig,
    "fabric.": schema.FabricConfig,
    "tracking.": schema.TrackingConfig,
}
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
    """The whole help."""
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
            "Keys (with the schema's defaults; an option's file may set others):",
            *(line for prefix, kind in SECTIONS.items() for line in _keys(prefix, kind)),
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


def _keys(prefix: str, kind: Any) -> list[str]:
    comments = _comments(kind)
    fields = [field for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    plain = [
        field
        for field in fields
        if not dataclasses.is_dataclass(field.default_factory) and field.type != "Any"
    ]
    lines = [f"  {prefix}"] if prefix else []
    return lines + [
        f"    {field.name:<26}{_value(field):<16}{comments.get(field.name, '')}".rstrip()
        for field in plain
    ]


def _value(field: Any) -> str:
    choices = field.metadata.get("choices")
    if choices:
        return "|".join(choices) + " "
    default = field.default
    if default is dataclasses.MISSING or default == "???":
        return ""
    return "null" if default is None else str(default)


def _comments(kind: Any) -> dict[str, str]:
    """The comment at each field of a schema."""
    pairs = (
        line.split("#", 1)
        for line in inspect.getsource(kind).splitlines()
        if "#" in line and ":" in line
    )
    return {code.split(":")[0].strip(): comment.strip() for code, comment in pairs}
