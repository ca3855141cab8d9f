"""The text of `--help`: default options are marked, keys are explained, lines are short."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import yaml

from softmod.config import help, schema
from softmod.config.groups import GROUPS, conf_folder, options

KINDS = {
    kind.__name__: kind
    for kind in (
        *schema.NETWORKS.values(),
        *schema.VALUE_HEADS.values(),
        *(kind for _, kind, _ in help.SECTIONS),
        schema.AdamConfig,
        schema.EvaluateConfig,
        schema.ExportConfig,
        schema.ReportConfig,
        schema.UiConfig,
    )
}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Return the lines of the help."""
    return help.text().splitlines()


def entries(path: str) -> list[Any]:
    """Return the defaults list of a file in `conf/`."""
    content = yaml.safe_load((conf_folder() / f"{path}.yaml").read_text()) or {}
    return content.get("defaults", [])


def overrides(group: str, option: str) -> dict[str, str]:
    """Return the options that an option selects in other groups; its own win over its base's."""
    chosen: dict[str, str] = {}
    own: dict[str, str] = {}
    for entry in entries(f"{group}/{option}"):
        if entry == "_self_":
            continue
        if isinstance(entry, str):
            chosen |= overrides(group, entry)
            continue
        for key, value in entry.items():
            if key.startswith("override /"):
                own[key.removeprefix("override /").partition("@_global_")[0]] = value
    return chosen | own


def defaults() -> set[tuple[str, str]]:
    """Return groups and options selected by `conf/train.yaml`; later selections win."""
    chosen: dict[str, str] = {}
    for entry in entries("train"):
        if isinstance(entry, dict):
            chosen |= {key: value for key, value in entry.items() if not key.startswith("override")}
    for mount, option in list(chosen.items()):
        if option is not None:
            chosen |= overrides(mount.partition("@")[0], option)
    return {
        (mount.partition("@")[0], option) for mount, option in chosen.items() if option is not None
    }


def marked(lines: list[str], group: str) -> set[tuple[str, str]]:
    """Return the marked options of a group."""
    start = next(i for i, line in enumerate(lines) if re.match(rf"  {group:<12}\w", line))
    block = itertools.takewhile(lambda line: not line.strip().startswith("("), lines[start:])
    return {(group, name) for name in re.findall(r"(\w+)\*", " ".join(block))}


def test_exactly_the_default_options_are_marked(lines: list[str]):
    found = set().union(*(marked(lines, group) for group in GROUPS))
    assert found == defaults()
    assert {group for group, _ in found} == {*GROUPS} - {"variant", "sweep", "experiment"}
    assert any("* selected by default" in line for line in lines)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_listed_and_every_group_explained(group: str, lines: list[str]):
    text = "\n".join(lines)
    assert all(re.search(rf"\b{name}\b", text) for name in options(group))
    assert group in help.ABOUT


def test_lines_are_short(lines: list[str]):
    assert max(map(len, lines)) <= help.COLUMNS
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_explained(kind: str):
    comments = help.field_comments(KINDS[kind])
    for field in dataclasses.fields(KINDS[kind]):
        group = field.default_factory is not dataclasses.MISSING
        assert field.name.startswith("_") or group or comments.get(field.name), field.name


def test_seen_failing_help_without_marks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(help, "selected", lambda composed: set())
    lines = help.text().splitlines()
    assert not set().union(*(marked(lines, group) for group in GROUPS))
