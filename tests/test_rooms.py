"""The rooms of the package, from the ground up: imports run downwards only."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import softmod

PACKAGE = Path(softmod.__file__).parent
FLOORS = [  # each may import what stands above it in this list, and its own
    ("errors",),
    ("spec", "seeding", "counter", "clock"),
    ("system",),
    ("kernels",),
    ("capture",),
    ("envs",),
    ("config",),
    ("networks",),
    ("agent",),
    ("workers",),
    ("tracking",),
    ("checkpoint",),
    ("command",),
    ("experiment",),
    ("report",),
    ("train", "evaluate", "export", "search", "upload", "state", "replay_fault", "ui"),
    ("softmod", "__main__"),  # the Python interface, and the list of commands
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", "softmod")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "softmod":
            names = [f"softmod.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.split(".")[1] for name in names if name.startswith("softmod."))


def upwards(path: Path) -> list[str]:
    own = FLOOR[room_of(path)]
    return [room for room in imported(path) if FLOOR[room] > own]


def in_the_encoding_of_the_locale(path: Path) -> list[str]:
    """The calls that read or write text without an encoding; that of the locale may be ASCII."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if re.search(r"(read_text|write_text|(?<!os\.)\bopen)$", ast.unparse(call.func))
        and not re.search(r"encoding=|'[rwa]b'\)$", ast.unparse(call))
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    assert upwards(path) == []


def test_an_import_that_runs_upwards_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "agent").mkdir()
    faulty = tmp_path / "agent" / "mine.py"
    faulty.write_text(
        "def late():\n    from softmod.tracking import names\n    from softmod import spec"
    )
    assert upwards(faulty) == ["tracking"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_is_read_and_written_as_utf_8(path: Path) -> None:
    assert in_the_encoding_of_the_locale(path) == []


def test_an_encoding_that_is_missing_is_seen(tmp_path: Path):
    faulty = tmp_path / "mine.py"
    faulty.write_text("Path('a').open('rb')\nos.open('c', 0)\nopen('b')\np.read_text()")
    assert in_the_encoding_of_the_locale(faulty) == ["open('b')", "p.read_text()"]


def test_no_file_bears_a_name_of_the_standard_library() -> None:
    assert [path.name for path in FILES if path.stem in sys.stdlib_module_names] == []


def test_tests_mirror_the_package() -> None:
    """Each room has a folder of tests; what tests commands or promises lies in two more."""
    tests = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= tests
