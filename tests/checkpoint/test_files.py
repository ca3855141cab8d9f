"""Checkpoints are atomic; damage is found and named; the newest valid one is used; no pickle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softmod.checkpoint import files as checkpoint
from softmod.errors import CheckpointError, SaveError

GROUPS = {
    "agent": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(4)},
    "replay": {"rows": torch.ones(5)},
}


def write(run: Path, step: int) -> Path:
    return checkpoint.save(run / "checkpoints" / f"step_{step:012d}", GROUPS, {"step": step})


def test_what_is_saved_comes_back(tmp_path):
    folder = write(tmp_path, 10)
    assert checkpoint.verify(folder) == {"step": 10}
    for group, saved in GROUPS.items():
        found = checkpoint.arrays(folder, group)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert sorted(path.name for path in folder.iterdir()) == [
        "agent.safetensors", "facts.json", "manifest.json", "replay.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "file", ["agent.safetensors", "facts.json", "manifest.json", "replay.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "emptied"])
def test_damage_is_found_and_passed_over(tmp_path, file, damage, caplog):
    write(tmp_path, 10)
    path = write(tmp_path, 20) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        cut = {"truncated": content[:-3], "flipped": content, "emptied": b""}[damage]
        path.write_bytes(bytes(cut) if damage != "truncated" else path.read_bytes()[:-3])
    found = checkpoint.newest(tmp_path)
    assert "damaged checkpoint skipped: step_000000000020" in caplog.text
    assert found is not None
    assert found[0].name == "step_000000000010"


def test_none_valid_is_an_error_and_none_at_all_is_not(tmp_path, caplog):
    assert checkpoint.newest(tmp_path) is None
    (write(tmp_path, 10) / "facts.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        "nonsense",
        '{"format": 3, "shared": {}, "files": [1]}',
        '{"format": 99, "files": {}}',
    ],
)
def test_any_manifest_is_answered_in_one_line(tmp_path, manifest):
    folder = write(tmp_path, 10)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError) as told:
        checkpoint.verify(folder)
    assert "\n" not in str(told.value)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = write(tmp_path, 10)
    (tmp_path / "secret").write_text("x")
    (folder / "manifest.json").write_text(
        json.dumps({"format": 3, "shared": {}, "files": {"../../secret": "0"}})
    )
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.verify(folder)


def test_an_unfinished_one_is_not_seen(tmp_path):
    folder = write(tmp_path, 10)
    shutil.copytree(folder, folder.with_name(".step_000000000020.part"))
    assert checkpoint.newest(tmp_path)[0] == folder
    write(tmp_path, 20)  # takes the place of what was left over
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_saving_again_replaces_as_a_whole(tmp_path):
    folder = write(tmp_path, 10)
    checkpoint.save(folder, {"agent": {"other": torch.zeros(1)}}, {"step": 11})
    assert checkpoint.verify(folder) == {"step": 11}
    assert not (folder / "replay.safetensors").exists()


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write(tmp_path, 10)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(SaveError, match="No space left"):
        checkpoint.save(folder, GROUPS, {"step": 99})
    assert checkpoint.verify(folder) == {"step": 10}
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_last_two_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, tmp_path / "checkpoints" / f"step_{step:012d}")
    assert [folder.name[-2:] for folder in checkpoint.all_in(tmp_path)] == ["30", "40"]


def test_what_was_just_saved_stays_and_newer_damaged_ones_go(tmp_path):
    """Cover a run that resumed from an older checkpoint than its newest."""
    for step in (10, 30, 40):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, write(tmp_path, 20))
    assert [folder.name[-2:] for folder in checkpoint.all_in(tmp_path)] == ["10", "20"]


def test_a_checkpoint_in_the_place_of_another_is_another_version(tmp_path):
    write(tmp_path, 10)
    before = checkpoint.versions(tmp_path)
    assert before == checkpoint.versions(tmp_path)
    checkpoint.save(tmp_path / "checkpoints" / "step_000000000010", GROUPS, {"step": 11})
    assert before.keys() == checkpoint.versions(tmp_path).keys()
    assert before != checkpoint.versions(tmp_path)
    (tmp_path / "checkpoints" / "step_000000000010" / "manifest.json").unlink()
    assert checkpoint.versions(tmp_path) == {}


def test_another_form_is_refused_before_anything_is_copied():
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="network in the checkpoint: b is missing"):
        checkpoint.restore_arrays(live, {"a": torch.ones(2)}, "network")
    with pytest.raises(CheckpointError, match=r"b has shape \[4\]; must be \[3\]"):
        checkpoint.restore_arrays(live, {"a": torch.ones(2), "b": torch.ones(4)}, "network")
    assert not live["a"].any()


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    """Limit the file size in a separate process, because another library writes the arrays."""
    before = write(tmp_path, 10)
    code = """
import resource, sys, torch
from pathlib import Path
from softmod.checkpoint import files as checkpoint
from softmod.errors import SaveError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), {"agent": {"weight": torch.ones(100_000)}}, {})
except SaveError as error:
    print("told:", error)
"""
    line = [sys.executable, "-c", code, str(before.with_name("step_000000000020"))]
    told = subprocess.run(line, capture_output=True, text=True, check=False)
    assert told.stdout.startswith("told:"), told.stderr
    assert [path.name for path in before.parent.iterdir()] == [before.name]


def test_other_users_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        folder = write(tmp_path, 10)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, caplog):
    write(tmp_path, 10)
    path = write(tmp_path, 20) / "agent.safetensors"
    digest = checkpoint.digest

    def refuse(file: Path) -> str:
        if file == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return digest(file)

    monkeypatch.setattr(checkpoint, "digest", refuse)
    with pytest.raises(CheckpointError) as told:
        checkpoint.newest(tmp_path)
    assert str(told.value) == f"{path}: cannot be read (Permission denied)"
    assert not caplog.text


def test_copies_of_a_user_stay_and_are_not_resumed_from(tmp_path):
    own = ["step_000000000010.bak", "step_000000000010 copy", "step_best", ".notes"]
    for name in own:
        shutil.copytree(write(tmp_path, 10), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / ".step_000000000050.part").mkdir()
    for step in (20, 30, 40):
        checkpoint.prune(tmp_path, write(tmp_path, step))
    kept = [f"step_{step:012d}" for step in (30, 40)]
    assert [folder.name for folder in checkpoint.all_in(tmp_path)] == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(own + kept)


@pytest.fixture
def overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no checkpoint be renamed, as on an overlay file system whose image holds them."""
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if not self.name.startswith("."):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)


@pytest.mark.usefixtures("overlay")
def test_a_checkpoint_of_an_image_is_replaced(tmp_path):
    folder = write(tmp_path, 10)
    checkpoint.save(folder, GROUPS, {"step": 11})
    assert checkpoint.verify(folder) == {"step": 11}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("overlay")
def test_killed_while_a_checkpoint_of_an_image_is_removed(tmp_path, monkeypatch):
    folder = write(tmp_path, 10)
    rmtree = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if path == folder:
            (folder / "facts.json").unlink()
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, GROUPS, {"step": 11})
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == {"step": 10}
