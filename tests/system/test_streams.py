"""Tests of softmod.system.streams."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from softmod.system import streams

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


def test_without_a_temporary_folder_one_line_names_the_way_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(SystemExit) as ended:
        streams.exit_with(lambda: 0)
    assert ended.value.code == 5
    assert capsys.readouterr().err.startswith("softmod: no temporary folder can be written (No ")


def test_settings_of_matplotlib_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes("# für Berichte\n".encode("latin-1"))
    code = """
from softmod.system.streams import exit_with

def command():
    import matplotlib
    return 0

exit_with(command)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
