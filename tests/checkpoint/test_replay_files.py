"""The replay in pieces: only new rows are written, and the same replay is restored, whatever the
order of events.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from softmod.agent.replay import Replay
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.replay_files import Archive, span
from softmod.errors import CheckpointError
from tests.agent.test_replay import agree
from tests.stream import FRAMES, Stream

WIDTH = FRAMES.state_dim + FRAMES.action_dim + 2


def filled(capacity: int, *counts: int, copies: int = 1) -> tuple[Replay, Stream]:
    replay, stream = Replay(FRAMES, capacity, copies=copies), Stream(FRAMES, copies)
    for count in counts:
        replay.extend(stream.rollout(count))
    return replay, stream


def sizes(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (run / "replay").iterdir()}


def test_each_save_writes_what_is_new(tmp_path: Path):
    replay, stream = filled(1000, 500)
    archive = Archive(tmp_path, replay)
    first = archive.save()
    assert list(first) == ["000000000000-000000000500.safetensors"]
    assert archive.save() == first  # nothing new, nothing written
    replay.extend(stream.rollout(20))
    assert set(archive.save()) - set(first) == {"000000000500-000000000520.safetensors"}
    new = sizes(tmp_path)["000000000500-000000000520.safetensors"]
    assert new < 3 * (20 * WIDTH + 20 * FRAMES.obs_dim) * 4 + 500


def test_pieces_that_hold_only_what_was_overwritten_are_let_go(tmp_path: Path):
    replay, stream = filled(99, 60)
    archive = Archive(tmp_path, replay)
    archive.save()
    for _ in range(3):
        replay.extend(stream.rollout(40))
        archive.save()
    assert [span(name) for name in archive.pieces] == [
        (60, 100),
        (100, 140),
        (140, 180),
    ]  # 81 to 180 can be drawn, and the state before them lies in 80
    archive.prune(archive.pieces)
    assert sorted(sizes(tmp_path)) == sorted(archive.pieces)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(4, 20), st.integers(1, 2), st.sampled_from([0.1, 0.9]),
    st.lists(st.one_of(st.integers(1, 30), st.just("save"), st.just("restart")), max_size=25),
)  # fmt: skip
def test_what_comes_back_is_what_was_there(
    tmp_path_factory, capacity: int, copies: int, faults: float, events: list
):
    run = tmp_path_factory.mktemp("run")
    replay, stream = Replay(FRAMES, capacity, copies=copies), Stream(FRAMES, copies, faults=faults)
    archive = Archive(run, replay)
    saved = (archive.save(), 0, deepcopy(stream))
    for event in [*events, "save", "restart"]:
        if event == "save":
            saved = (archive.save(), replay.written, deepcopy(stream))
            archive.prune(saved[0])
        elif event == "restart":  # all that was not saved is lost
            replay, stream = Replay(FRAMES, capacity, copies=copies), deepcopy(saved[2])
            replay.rows.fill_(torch.nan)
            replay.episodes.fill_(torch.nan)
            archive = Archive(run, replay)
            archive.restore(*saved[:2])
            assert replay.written == saved[1]
            if replay.size:
                agree(replay, stream, 2, draws=20)
        else:
            replay.extend(stream.rollout(event))


def whole(run: Path, archive: Archive, number: int) -> Path:
    shared = {f"replay/{name}": hashed for name, hashed in archive.save().items()}
    return checkpoint.save(
        run / "checkpoints" / f"step_{number:012d}", {}, {"kind": "whole"}, shared
    )


def test_a_damaged_piece_damages_the_checkpoints_that_need_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    replay, stream = filled(1000, 50)
    archive = Archive(tmp_path, replay)
    first = whole(tmp_path, archive, 1)
    replay.extend(stream.rollout(10))
    second = whole(tmp_path, archive, 2)
    piece = tmp_path / "replay" / "000000000050-000000000060.safetensors"
    content = piece.read_bytes()
    for damage in (content[:-1], content[:-3] + b"\1" + content[-2:], b""):
        piece.write_bytes(damage)
        with pytest.raises(
            CheckpointError, match=r"000060\.safetensors: does not match the hash in the manifest"
        ):
            checkpoint.verify(second)
        assert checkpoint.newest(tmp_path)[0] == first
    piece.unlink()
    assert checkpoint.newest(tmp_path)[0] == first
    assert caplog.text.count("damaged checkpoint skipped") == 4


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "replay/../../secret", "secret", "replay/x/y"]
)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str):
    folder = whole(tmp_path, Archive(tmp_path, filled(10, 5)[0]), 1)
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shared"] = {name: "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.verify(folder)


def test_a_link_is_not_followed(tmp_path: Path):
    archive = Archive(tmp_path, filled(10, 5)[0])
    folder = whole(tmp_path, archive, 1)
    (piece,) = (tmp_path / "replay").iterdir()
    piece.rename(tmp_path / "elsewhere")
    piece.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        checkpoint.verify(folder)


def test_rows_that_are_missing_are_told(tmp_path: Path):
    replay, stream = filled(100, 10)
    archive = Archive(tmp_path, replay)
    archive.save()
    replay.extend(stream.rollout(10))
    archive.save()
    replay.extend(stream.rollout(10))
    pieces = archive.save()
    del pieces["000000000010-000000000020.safetensors"]
    with pytest.raises(CheckpointError, match="no piece holds the rows from 10 to 20"):
        Archive(tmp_path, Replay(FRAMES, 100)).restore(pieces, 30)
    with pytest.raises(CheckpointError, match="not the name of a piece"):
        Archive(tmp_path, Replay(FRAMES, 100)).restore({"x.safetensors": ""}, 30)


def test_a_replay_of_an_earlier_version_is_told(tmp_path: Path):
    replay, _ = filled(100, 10)
    (name,) = pieces = Archive(tmp_path, replay).save()
    save_file({"rows": torch.zeros(3, 10, 17)}, tmp_path / "replay" / name)
    with pytest.raises(CheckpointError, match="written by another version"):
        Archive(tmp_path, Replay(FRAMES, 100)).restore(pieces, 10)


@pytest.mark.parametrize("left", [0.0, -1e6, torch.nan, 1e9])
def test_what_lay_in_memory_before_a_restore_does_not_matter(tmp_path: Path, left: float):
    """Cover several pieces, outdated rows in the oldest, and more episodes than slots."""
    replay, stream = filled(15, copies=2)
    stream.faults = 0.9
    archive, pieces = Archive(tmp_path, replay), {}
    for _ in range(9):
        replay.extend(stream.rollout(5))
        pieces = archive.save()
    again = Replay(FRAMES, 15, copies=2)
    again.rows.fill_(left)
    Archive(tmp_path, again).restore(pieces, replay.written)
    for one in (replay, again):
        stream_of_one = deepcopy(stream)
        for _ in range(4):
            one.extend(stream_of_one.rollout(5))
        agree(one, stream_of_one, 2)
    assert again.episodes.shape[1] <= 4 * replay.ring
