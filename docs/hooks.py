"""Generate the reference pages of the site: `<!-- generated: NAME -->` in a page is replaced.

Groups, keys and comments come from `conf/` and the schemas, help texts from the commands, names of
metrics from `softmod.tracking.names`.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

from omegaconf import DictConfig, OmegaConf

from softmod.config import help as texts
from softmod.config import schema
from softmod.config.compose import compose
from softmod.config.groups import GROUPS, conf_folder, options
from softmod.tracking import names

MARK = re.compile(r"<!-- generated: (\w+) -->")
COMMANDS = (  # module, and the words before --help
    ("softmod.train",),
    ("softmod.evaluate",),
    ("softmod.export",),
    ("softmod.report",),
    ("softmod.search",),
    ("softmod.ui",),
    ("softmod.envs",),
    ("softmod.state",),
    ("softmod.state", "pack"),
    ("softmod.state", "unpack"),
    ("softmod.upload",),
    ("softmod.replay_fault",),
)
COLUMNS = "100"  # of a help text


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page (an event of MkDocs)."""
    return MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


# --- groups and keys ------------------------------------------------------------------------------


def groups() -> str:
    """Return a table of options for each group."""
    chosen = compose([], hydra=True).hydra.runtime.choices
    parts = []
    for group in GROUPS:
        defaults = {option for key, option in chosen.items() if key.partition("@")[0] == group}
        rows = [
            (f"**`{option}`**" if option in defaults else f"`{option}`", about(group, option))
            for option in options(group)
        ]
        meaning = texts.ABOUT.get(group, "")
        parts += [f"### {group}", *([f"{capital(meaning)}."] if meaning else [])]
        parts.append(table(("option", "meaning"), rows))
    return "\n\n".join(parts)


def about(group: str, option: str) -> str:
    """Return the first comment of an option's file."""
    words = []
    for line in (conf_folder() / group / f"{option}.yaml").read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if line.startswith("# "):
            words.append(line.removeprefix("# "))
        elif words or not line.startswith(("defaults:", "  - ", "_target_", "")):
            break
    return " ".join(words)


def keys() -> str:
    """Return a table of keys for each part of the configuration."""
    default = compose([])
    parts = []
    for title, kind, key in texts.SECTIONS:
        if key in ("actor", "critic_head"):
            continue
        values = OmegaConf.select(default, key) if key else default
        parts += [f"### {heading(title, key)}", doc(kind), key_table(kind, values)]
    return "\n\n".join(part for part in parts if part)


def heading(title: str, key: str) -> str:
    return f"`{key}.`" if key else title or "Top level"


def networks() -> str:
    """Return a table of keys for each network's schema."""
    parts = []
    for name, kind in schema.NETWORKS.items():
        values = compose([f"network@actor={name}"]).actor
        parts += [f"### `network@actor={name}`", doc(kind), key_table(kind, values)]
    return "\n\n".join(parts)


def heads() -> str:
    """Return a table of keys for each critic head."""
    parts = []
    for name, kind in schema.VALUE_HEADS.items():
        values = compose([f"critic_head={name}"]).critic_head
        shown = key_table(kind, values)
        parts += [f"### `critic_head={name}`", doc(kind), shown]
    return "\n\n".join(part for part in parts if part)


def doc(kind: Any) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def key_table(kind: Any, values: DictConfig) -> str:
    """Return a table of a schema's keys; empty where it has none of its own."""
    comments = texts.field_comments(kind)
    rows = [
        (
            f"`{field.name}`",
            f"`{texts.value_text(values.get(field.name))}`",
            allowed(field),
            comments.get(field.name, ""),
        )
        for field in dataclasses.fields(kind)
        if not field.name.startswith("_") and not is_group(values.get(field.name))
    ]
    return table(("key", "value", "allowed", "meaning"), rows) if rows else "No keys."


def is_group(value: Any) -> bool:
    """Return whether a value has a table of its own."""
    return isinstance(value, DictConfig) and len(value) > 0


def allowed(field: Any) -> str:
    """Return what a key may be: its type, its range or its choices."""
    kind = str(field.type)
    null = " or `null`" if "None" in kind else ""
    kind = kind.replace(" | None", "")
    if "choices" in field.metadata:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) + null
    words = {"int": "integer", "float": "number", "str": "text", "bool": "`true`, `false`"}
    words["dict[str, Any]"] = "keys and values"
    listed = re.fullmatch(r"list\[(\w+)\]", kind)
    word = words.get(kind, kind)
    if listed:
        word = f"list of {words.get(listed[1], 'mapping')}s"
    limits = within(field.metadata)
    comma = "," if null and limits else ""
    return f"{word}{limits}{comma}{null}"


def within(metadata: Any) -> str:
    """Return the range of a number, as words."""
    low = metadata.get("low")
    high = metadata.get("high")
    if low is None:
        return ""
    if high is not None:
        return f" in {'(' if metadata['open_low'] else '['}{low:g}, {high:g}]"
    return f" above {low:g}" if metadata["open_low"] else f", at least {low:g}"


# --- commands -------------------------------------------------------------------------------------


def commands() -> str:
    """Return the help text of every command."""
    return "\n\n".join(
        f"## python -m {' '.join(words)}\n\n```text\n{help_of(words)}\n```" for words in COMMANDS
    )


def help_of(words: Sequence[str]) -> str:
    """Run a command with --help in this process; return what it prints."""
    printed = io.StringIO()
    line = [*words, "--help"]
    environment = mock.patch.dict(os.environ, {"COLUMNS": COLUMNS})
    arguments = mock.patch.object(sys, "argv", line)
    with environment, arguments, redirect_stdout(printed):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=False)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{' '.join(line)}: exit code {end.code}") from end
    text = printed.getvalue().rstrip()
    if not text:
        raise RuntimeError(f"{' '.join(line)}: printed nothing")
    begin, mark, rest = text.partition("Groups and their options:")
    if not mark:
        return text
    return f"{begin}{mark}\n  (see Configuration)\n\n{rest[rest.index('Exit codes:') :]}"


# --- metrics --------------------------------------------------------------------------------------


def metrics() -> str:
    """Return a table of the names in `softmod.tracking.names`, and their meanings."""
    return table(("name", "meaning"), sorted(named()))


def named() -> Iterator[tuple[str, str]]:
    """Yield every name and what it means: its comment, or the docstring of its function."""
    for line in inspect.getsource(names).splitlines():
        constant = re.fullmatch(r'[A-Z_]+ = "([\w/]+)"(?:  # (.*))?', line)
        if constant:
            yield f"`{constant[1]}`", constant[2] or ""
    for function in vars(names).values():
        if inspect.isfunction(function):
            (argument,) = inspect.signature(function).parameters
            meaning = (function.__doc__ or "").removeprefix("Return the name of ")
            yield f"`{function(f'<{argument}>')}`", meaning.rstrip(".")


# --- Markdown -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


GENERATED: dict[str, Callable[[], str]] = {
    "groups": groups,
    "keys": keys,
    "networks": networks,
    "heads": heads,
    "commands": commands,
    "metrics": metrics,
}
