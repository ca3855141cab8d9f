"""The text of `--help`: groups with their options, and keys with their default values."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from softmod.config import schema
from softmod.config.compose import compose
from softmod.config.groups import GROUPS, options

COLUMNS = 100
NAME = 26  # columns of a key
VALUE = 16  # columns of a value
SECTIONS: tuple[tuple[str, Any, str], ...] = (  # title, schema, key
    ("", schema.TrainConfig, ""),
    ("env.", schema.EnvConfig, "env"),
    ("actor.", schema.SoftModularConfig, "actor"),
    ("critic.", schema.ResidualConfig, "critic"),
    ("policy.", schema.PolicyConfig, "policy"),
    ("critic_head.", schema.CategoricalConfig, "critic_head"),
    ("algorithm.", schema.AlgorithmConfig, "algorithm"),
    ("optimizer.actor. (also optimizer.critic., optimizer.temperature.)",
     schema.AdamWConfig, "optimizer.actor"),
    ("run.", schema.RunConfig, "run"),
    ("workers.", schema.WorkersConfig, "workers"),
    ("fabric.", schema.FabricConfig, "fabric"),
    ("tracking.", schema.TrackingConfig, "tracking"),
)  # fmt: skip
ABOUT = {
    "env": "task sets; python -m softmod.envs lists the tasks",
    "model": "networks of actor and critics",
    "network": "one network: network@actor=... or network@critic=...",
    "critic_head": "output of the critics: a value, or a distribution over values",
    "algorithm": (
        "the update with its optimizers: fast is the default recipe, mtsac the published form"
    ),
    "optimizer": (
        "one optimizer: optimizer@optimizer.actor=..., optimizer@optimizer.critic=... or"
        " optimizer@optimizer.temperature=..."
    ),
    "run": (
        "steps, batch, replay and intervals: recipe is the default of mt1, mt10, mt25 and mt50;"
        " paper is the published protocol; smoke takes a minute"
    ),
    "workers": "processes that step the environments",
    "fabric": "device of the learner",
    "tracking": "MLflow, or the run's journal alone",
    "experiment": "presets that select options of the groups above",
    "variant": (
        "one difference between the paper and its released code, or the recipe without one part"
    ),
    "sweep": "ablations: several runs under one parent",
}
USAGE = """softmod-train: train one policy on many robot tasks with soft modularization

usage: python -m softmod.train [GROUP=OPTION ...] [KEY=VALUE ...] [-m] [--cfg job]
                               [--config-dir DIR]

  python -m softmod.train                                       the quickstart
  python -m softmod.train env=mt10 model=soft_modular seed=3
  python -m softmod.train env=mt50 model=moore run=smoke        every part of a run, in a minute
  python -m softmod.train experiment=paper_mt10 model=care      2 M env steps per task
  python -m softmod.train -m seed=0,1,2 model=soft_modular_small,mt_sac

The same command resumes a stopped run.
-m            run every combination, one after another, under one parent run
--cfg job     print the resolved configuration and exit
--config-dir  add a folder of your own, searched before conf/"""
KEYS = """\
Keys, with their values in the default configuration. A number in parentheses is a difference
between the paper and its released code (docs/paper_and_code.md)."""
EXIT_CODES = """\
Exit codes: 0 done, 2 invalid configuration, 3 no valid checkpoint, 4 checkpoint not written,
5 environment failure, 6 numerical failure, 130 Ctrl-C, 143 stopped by a signal."""


def text() -> str:
    """Return the whole help, at most `COLUMNS` wide."""
    default = compose([], hydra=True)
    chosen = selected(default)
    lines = [USAGE, "", "Groups and their options (* selected by default):"]
    for group in GROUPS:
        lines += _group(group, chosen)
    lines += ["", KEYS]
    for title, kind, key in SECTIONS:
        lines += _keys(title, kind, key, default)
    return "\n".join([*lines, "", EXIT_CODES])


def selected(composed: DictConfig) -> set[tuple[str, str]]:
    """Return the groups and options that a configuration is composed of."""
    choices = composed.hydra.runtime.choices
    return {(str(key).partition("@")[0], str(option)) for key, option in choices.items() if option}


def _group(group: str, chosen: set[tuple[str, str]]) -> list[str]:
    """Return the lines of a group: its options, marked if selected by default, and a remark."""
    names = [f"{name}*" if (group, name) in chosen else name for name in options(group)]
    return [
        *_wrapped(f"  {group:<12}", ", ".join(names)),
        *_wrapped(" " * 14, f"({ABOUT[group]})"),
    ]


def _keys(title: str, kind: Any, key: str, default: DictConfig) -> list[str]:
    """Return the lines of a section: each key with its default value and its meaning."""
    comments = field_comments(kind)
    values = OmegaConf.select(default, key) if key else default
    lines = [f"  {title}"] if title else []
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if field.name.startswith("_") or isinstance(value, DictConfig):
            continue
        about = [comments[field.name]] if field.name in comments else []
        if "choices" in field.metadata:
            about.append(f"one of {', '.join(field.metadata['choices'])}")
        lines += _key(field.name, value_text(value), "; ".join(about))
    return lines


def _key(name: str, value: str, about: str) -> list[str]:
    """Return the lines of a key; the meaning of a long value begins on a line of its own."""
    beginning = f"    {name:<{NAME}}{value:<{VALUE}}"
    if len(value) < VALUE:
        return _wrapped(beginning, about)
    return [beginning.rstrip(), *(_wrapped(" " * (4 + NAME + VALUE), about) if about else [])]


def _wrapped(beginning: str, words: str) -> list[str]:
    """Wrap words behind a beginning, with later lines indented by its width."""
    indent = " " * len(beginning)
    lines = textwrap.wrap(
        words,
        COLUMNS,
        initial_indent=beginning,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [beginning.rstrip()]


def value_text(value: Any) -> str:
    """Write a value as it is typed on a command line."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def field_comments(kind: Any) -> dict[str, str]:
    """Return the comment of each field of a dataclass: on its line, or on the line above."""
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _own_comments(base)
    return comments


def _own_comments(kind: Any) -> dict[str, str]:
    """Return the comments of the fields that a dataclass declares itself."""
    comments: dict[str, str] = {}
    above = ""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("#")
        name, colon, _ = code.partition(":")
        if colon and (comment or above):
            comments[name.strip()] = comment.strip() or above
        above = comment.strip() if not code.strip() else ""
    return comments
