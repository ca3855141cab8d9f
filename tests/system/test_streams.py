"""Tests of softmod.system.streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

INTERRUPTED = """
from softmod.system.streams import exit_with

def command():
    try:
        exec("raise KeyboardInterrupt")  # where dataclasses and namedtuples run generated code
    except KeyboardInterrupt:
        return 130

exit_with(command)
"""


def test_ctrl_c_within_generated_code_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """Python would die of SIGINT (-2) in a module that `python -m` runs."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 130
