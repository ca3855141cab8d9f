"""`python -m softmod`: the list of commands."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from softmod import __main__ as commands


def test_it_lists_commands_that_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["softmod", "--help"])
    assert commands.main() == 0
    listed = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"  softmod.{name} " in listed
        assert find_spec(f"softmod.{name}") is not None


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
