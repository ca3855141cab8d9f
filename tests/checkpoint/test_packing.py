"""A packed run is unpacked and resumed bit for bit; damage on the way is detected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod import state
from softmod.checkpoint.packing import MANIFEST, narrow, widen
from softmod.system.files import digest
from tests.command.test_train import here, only, run

__all__ = ["here"]


@settings(max_examples=50, deadline=None)
@given(
    tasks=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_arrays_come_back_to_the_bit(tasks: int, rows: int, columns: int, seed: int):
    draws = np.random.default_rng(seed)
    array = draws.integers(0, 2**32, (tasks, rows, columns), np.uint32).view(
        np.float32
    )  # NaN and infinities too
    array[:, :, draws.random(columns) < 0.5] = 0.5
    assert widen(narrow(array)).tobytes() == array.tobytes()
    assert widen(narrow(array)).shape == array.shape


def test_what_does_not_change_takes_no_room():
    array = np.zeros((2, 1000, 10), np.float32)
    array[..., 0] = np.arange(1000)
    assert narrow(array).nbytes < 2 * 4 * 1000 + 200


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
    capsys.readouterr()
    code = state.main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out.splitlines(), told.err


def test_a_packed_run_goes_on_to_the_same_end(here: Path, capsys: pytest.CaptureFixture[str]):
    assert run("run.folder=whole") == 0
    assert run("run.folder=first", "run.steps_per_task=90") == 0
    (first,) = here.glob("first/*/seed_0")
    hashes = said(capsys, first)[1][1:]
    assert said(capsys, "pack", first, here / "packed", "--part", 1)[0] == 0
    best = (first / "checkpoints" / "best" / "agent.safetensors").read_bytes()
    shutil.rmtree(here / "first")
    leftover = here / "first" / first.parent.name / f".{first.name}.part" / "result.json"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("{}")
    code, lines, _ = said(capsys, "unpack", here / "packed", here / "first")
    assert code == 0
    assert Path(lines[0]).parent.parent == first
    assert lines[1:] == hashes
    assert not leftover.parent.exists()
    assert (first / "checkpoints" / "best" / "agent.safetensors").read_bytes() == best
    assert run("run.folder=first") == 0
    ends = [
        dict(line.split() for line in said(capsys, next(here.glob(f"{name}/*/seed_0")))[1][1:])
        for name in ("whole", "first")
    ]
    assert {name for name in ends[0] if ends[0][name] != ends[1][name]} <= {
        "metrics",
        "counters",
        "state",
    }


def test_a_run_is_packed_under_its_name_from_wherever_it_is_seen(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run() == 0
    folder = only(here)
    monkeypatch.chdir(folder)
    assert said(capsys, "pack", ".", here / "packed")[0] == 0
    monkeypatch.chdir(here)
    assert (
        json.loads((here / "packed" / MANIFEST).read_text())["run"]
        == f"{folder.parent.name}/{folder.name}"
    )
    assert said(capsys, "unpack", "packed", "elsewhere")[0] == 0


def test_parts_that_are_no_archive_are_told(here: Path, capsys: pytest.CaptureFixture[str]):
    packed = here / "packed"
    packed.mkdir()
    (packed / "part_000").write_text("no archive")
    about = {"format": 1, "run": "a/seed_0", "parts": {"part_000": digest(packed / "part_000")}}
    (packed / MANIFEST).write_text(json.dumps(about))
    code, _, told = said(capsys, "unpack", packed, here / "runs")
    assert (code, "malformed content" in told) == (3, True)
    (here / "file").write_text("")
    assert run() == 0
    assert said(capsys, "pack", only(here), here / "file")[0] == 2


def test_what_cannot_be_packed_or_unpacked_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    assert run() == 0
    folder, packed = only(here), here / "packed"
    assert said(capsys, "pack", folder / "checkpoints" / "best", packed)[0] == 3
    assert not packed.exists()
    assert said(capsys, "pack", folder, packed)[0] == 0
    assert "must be an empty or missing folder" in said(capsys, "pack", folder, packed)[2]
    assert "exists already" in said(capsys, "unpack", packed, here / "runs")[2]
    manifest, part = packed / MANIFEST, packed / "part_000"
    about, content = json.loads(manifest.read_text()), part.read_bytes()
    elsewhere = here / "elsewhere"
    for damage in (content[:-1], content[:-9] + b"\1" + content[-8:]):
        part.write_bytes(damage)
        assert "does not match the hash" in said(capsys, "unpack", packed, elsewhere)[2]
    part.unlink()
    assert said(capsys, "unpack", packed, elsewhere)[0] == 3
    for odd in (
        {"format": 9},
        {"run": "../x"},
        {"run": "x"},
        {"parts": {"../part": ""}},
        {"parts": {}},
        {"parts": [1]},
    ):
        manifest.write_text(json.dumps(about | odd))
        assert said(capsys, "unpack", packed, elsewhere)[0] == 3
    assert not list(elsewhere.rglob("*")) if elsewhere.exists() else True
