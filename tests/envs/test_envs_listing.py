from __future__ import annotations

import subprocess
import sys

import pytest

from softmod.envs.__main__ import main
from softmod.envs.tasks import MT10, TASKS, TOY_TASKS


def listing(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "softmod.envs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_tasks_one_a_line_without_heavy_imports() -> None:
    done = listing()
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(TASKS)
    assert not [
        name
        for name in ("torch", "numpy", "metaworld", "mujoco", "rich")
        if f"| {name}\n" in done.stderr
    ]


def test_one_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mt10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(MT10)
    assert lines[0].split(maxsplit=4)[1:] == [
        "mt10",
        "mt25",
        "mt50",
        "move the gripper to the goal",
    ]
    assert "reward v1 seldom reports success" in lines[MT10.index("peg-insert-side-v3")]


def test_unknown_set_is_one_line_and_exit_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "softmod.envs", "mt11"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "unknown set 'mt11'; must be one of mt10, mt25, mt50, toy\n"


def test_a_terminal_gets_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "what to do" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(TOY_TASKS)
