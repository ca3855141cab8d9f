"""Tests of softmod.system.streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CAUGHT = """
from softmod.system.streams import exit_with

def command():
    try:
        exec("raise KeyboardInterrupt")  # where dataclasses and namedtuples run generated code
    except KeyboardInterrupt:
        return 130

exit_with(command)
"""
UNCAUGHT = """
from softmod.system.streams import exit_with

def command():
    exec("raise KeyboardInterrupt")

exit_with(command)
"""


@pytest.mark.parametrize("script", [CAUGHT, UNCAUGHT], ids=["caught", "uncaught"])
def test_the_exit_code_after_ctrl_c_within_generated_code(tmp_path: Path, script: str) -> None:
    """Python would die of SIGINT (-2) in a module that `python -m` runs, even if it is caught."""
    (tmp_path / "interrupted.py").write_text(script)
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "")
