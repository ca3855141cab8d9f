"""Variables of other programs, and child processes, do not change what a run does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import softmod
from softmod.system import environment
from softmod.system.hardware import available, environment_tags

CORES = """
import softmod, torch
from softmod.system.hardware import available
print(available())
"""


@pytest.mark.skipif(available() == 1, reason="a single core")
@pytest.mark.parametrize(
    "variable", [("OMP_PROC_BIND", "true"), ("OMP_PLACES", "cores"), ("GOMP_CPU_AFFINITY", "0")]
)
def test_openmp_does_not_bind_workers_to_one_core(variable: tuple[str, str]) -> None:
    name, value = variable
    done = subprocess.run(
        [sys.executable, "-c", CORES], env=os.environ | {name: value}, cwd=PACKAGE.parent,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) == available()
    assert f"softmod: {name}={value} ignored" in done.stderr


def test_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "1")
    monkeypatch.delenv("MISSING", raising=False)
    with environment.changed({"GIVEN": None, "MISSING": "2"}):
        assert "GIVEN" not in os.environ
        assert os.environ["MISSING"] == "2"
    assert os.environ["GIVEN"] == "1"
    assert "MISSING" not in os.environ


def test_children_search_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/others")
    monkeypatch.setattr(sys, "path", ["/app", "/lib"])
    folders = f"{PACKAGE.parent}{os.pathsep}/others"
    assert environment.of_children() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": folders}
    for own in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [own, "/lib"])
        assert environment.of_children() == {}
    tmp_path.rmdir()
    assert environment.of_children() == {}


def test_a_hook_does_not_change_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = environment_tags()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert environment_tags() == tags


PACKAGE = Path(softmod.__file__).parent
