"""`python -m softmod`: the list of commands."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import softmod
from softmod import __main__ as commands


def test_it_lists_commands_that_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["softmod", "--help"])
    assert commands.main() == 0
    listed = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"  softmod.{name} " in listed
        assert find_spec(f"softmod.{name}") is not None


def test_no_command_is_missing():
    package = Path(softmod.__file__).parent
    files = [path for path in package.rglob("*.py") if "  exit_with(" in path.read_text()]
    names = {path.parent.name if path.stem == "__main__" else path.stem for path in files}
    assert names == {*commands.COMMANDS, "softmod"}


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["train", "env=mt10"], "softmod: write python -m softmod.train\n"),
        (["trian"], "softmod: trian: there is no such command; did you mean train?\n"),
    ],
)
def test_a_command_is_a_module(monkeypatch, capsys, asked, answer):
    monkeypatch.setattr(sys, "argv", ["softmod", *asked])
    assert commands.main() == 2
    assert capsys.readouterr().err == answer
