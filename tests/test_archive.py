"""The replay in pieces: only what is new is written, and the same replay comes back, whatever the order of events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod import checkpoint
from softmod.archive import Archive, span
from softmod.errors import CheckpointError
from softmod.replay import Replay
from softmod.types import EnvSpec

SPEC = EnvSpec(("a", "b"), 3, 2, 10)
WIDTH = 3 + 2 + 1 + 3 + 1


def rows(start: int, count: int) -> torch.Tensor:
    """Rows that tell their number."""
    numbers = torch.arange(start, start + count, dtype=torch.float32)
    return numbers.expand(2, count).unsqueeze(-1).expand(-1, -1, WIDTH) + torch.tensor([0.0, 0.5])[:, None, None]


def filled(capacity: int, *counts: int) -> Replay:
    replay = Replay(SPEC, capacity)
    for count in counts:
        replay.append(rows(replay.written, count))
    return replay


def equal(one: Replay, other: Replay) -> bool:
    same = torch.equal(one.rows[:, : one.size], other.rows[:, : other.size])
    return one.written == other.written and one.size == other.size and same


def sizes(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (run / "replay").iterdir()}


def test_each_save_writes_what_is_new(tmp_path: Path):
    replay = filled(1000, 500)
    archive = Archive(tmp_path, replay)
    first = archive.save()
    assert list(first) == ["000000000000-000000000500.safetensors"]
    assert archive.save() == first  # nothing new, nothing written
    replay.append(rows(500, 20))
    assert set(archive.save()) - set(first) == {"000000000500-000000000520.safetensors"}
    new = sizes(tmp_path)["000000000500-000000000520.safetensors"]
    assert new < 2 * 20 * WIDTH * 4 + 500


def test_pieces_that_hold_only_what_was_overwritten_are_let_go(tmp_path: Path):
    replay = filled(100, 60)
    archive = Archive(tmp_path, replay)
    archive.save()
    for start in (60, 100, 140):
        replay.append(rows(start, 40))
        archive.save()
    assert [span(name) for name in archive.pieces] == [(60, 100), (100, 140), (140, 180)]  # 80 to 180 are held
    archive.prune(archive.pieces)
    assert sorted(sizes(tmp_path)) == sorted(archive.pieces)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.one_of(st.integers(1, 30), st.just("save"), st.just("restart")), max_size=25))
def test_what_comes_back_is_what_was_there(tmp_path_factory, capacity: int, events: list):
    run = tmp_path_factory.mktemp("run")
    replay = Replay(SPEC, capacity)
    archive = Archive(run, replay)
    saved = (archive.save(), 0)
    for event in [*events, "save", "restart"]:
        if event == "save":
            saved = (archive.save(), replay.written)
            archive.prune(saved[0])
        elif event == "restart":  # all that was not saved is lost
            replay = Replay(SPEC, capacity)
            archive = Archive(run, replay)
            archive.restore(*saved)
            assert equal(replay, filled(capacity, *[1] * saved[1]))
        else:
            replay.append(rows(replay.written, event))


def whole(run: Path, archive: Archive, number: int) -> Path:
    shared = {f"replay/{name}": hashed for name, hashed in archive.save().items()}
    return checkpoint.save(run / "checkpoints" / f"step_{number:012d}", {}, {"kind": "whole"}, shared)


def test_a_damaged_piece_damages_the_checkpoints_that_need_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    replay = filled(1000, 50)
    archive = Archive(tmp_path, replay)
    first = whole(tmp_path, archive, 1)
    replay.append(rows(50, 10))
    second = whole(tmp_path, archive, 2)
    piece = tmp_path / "replay" / "000000000050-000000000060.safetensors"
    content = piece.read_bytes()
    for damage in (content[:-1], content[:-3] + b"\1" + content[-2:], b""):
        piece.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"000060\.safetensors: its content is not what was saved"):
            checkpoint.verify(second)
        assert checkpoint.newest(tmp_path)[0] == first
    piece.unlink()
    assert checkpoint.newest(tmp_path)[0] == first
    assert caplog.text.count("damaged checkpoint passed over") == 4


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "replay/../../secret", "secret", "replay/x/y"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str):
    folder = whole(tmp_path, Archive(tmp_path, filled(10, 5)), 1)
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shared"] = {name: "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.verify(folder)


def test_a_link_is_not_followed(tmp_path: Path):
    archive = Archive(tmp_path, filled(10, 5))
    folder = whole(tmp_path, archive, 1)
    (piece,) = (tmp_path / "replay").iterdir()
    piece.rename(tmp_path / "elsewhere")
    piece.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.verify(folder)


def test_rows_that_are_missing_are_told(tmp_path: Path):
    replay = filled(100, 10)
    archive = Archive(tmp_path, replay)
    archive.save()
    replay.append(rows(10, 10))
    archive.save()
    replay.append(rows(20, 10))
    pieces = archive.save()
    del pieces["000000000010-000000000020.safetensors"]
    with pytest.raises(CheckpointError, match="no piece holds the rows from 10 to 20"):
        Archive(tmp_path, Replay(SPEC, 100)).restore(pieces, 30)
    with pytest.raises(CheckpointError, match="not the name of a piece"):
        Archive(tmp_path, Replay(SPEC, 100)).restore({"x.safetensors": ""}, 30)
