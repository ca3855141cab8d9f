"""Bars 5 to 7 in full: damaged files, kills within a save, disks that cannot be written.

Tests of the command line run it in separate processes, on the toy tasks.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.files import all_in, newest, shared
from softmod.errors import CheckpointError
from softmod.system import faults
from softmod.system.files import digest
from tests.command.test_train import SMALL, here, only, run
from tests.reliability.test_killed import Killed, hashes, leftovers, undisturbed

__all__ = ["here", "undisturbed"]

ROOT = Path(__file__).parents[2]
DAMAGES = 40  # of each kind
OFTEN = ("run.save_every=30", "run.eval_every=600")


def trained(
    here: Path, *words: str, fault: str = "", limit: int = 0, script: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command, or a script that patches it, to its end; `limit` bounds file sizes."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [
        sys.executable,
        *(["-c", script] if script else ["-m", "softmod.train"]),
        *SMALL,
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTMOD_FAULT": fault}
    return subprocess.run(
        line, cwd=here, env=environment, preexec_fn=bounded if limit else None, capture_output=True,
        text=True,
        timeout=240, check=False,
    )  # fmt: skip


def killed(fault: str, *words: str) -> None:
    """Run in this process, and die at a point."""

    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "armed", fault)
        patch.setattr(faults, "_turns", {})
        patch.setattr(faults, "die", die)
        with pytest.raises(Killed):
            run(*words)


def told(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that a run would resume from, and the warnings about others."""
    with patch.object(checkpoint.logger, "warning") as warn:
        try:
            found = newest(folder)
        except CheckpointError:
            found = None
    return found[0] if found else None, [
        call.args[0] % call.args[1:] for call in warn.call_args_list
    ]


def contents(folder: Path) -> dict[str, str]:
    """Return every file below a folder, by its hash."""
    return {
        str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enter a working folder with a run that was killed at 360 of its 600 steps; its last two
    checkpoints are whole.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        patch.setattr("sys.argv", ["softmod-train"])
        killed("checkpoint.pruned:4")
        return Path.cwd()


@pytest.fixture
def stopped(stopped_run: Path, here: Path) -> Path:
    """Copy the folder of that run to where this test may damage it."""
    shutil.copytree(stopped_run / "runs", here / "runs")
    return only(here)


# --- 5: damage ------------------------------------------------------------------------------------


def files_of(checkpoint: Path) -> list[Path]:
    """Return all files of a checkpoint: its own, and the pieces of the replay that it refers to."""
    return sorted(checkpoint.iterdir()) + [
        checkpoint.parents[1] / name for name in sorted(shared(checkpoint))
    ]


def flips(files: list[Path], draws: random.Random) -> Iterator[tuple[Path, bytes | None]]:
    """Yield a file with a single bit flipped, for every file in turn."""
    for number in range(DAMAGES):
        content = bytearray(files[number % len(files)].read_bytes())
        bit = draws.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        yield files[number % len(files)], bytes(content)


def damages(files: list[Path], draws: random.Random) -> Iterator[tuple[Path, bytes | None]]:
    """Yield a file and what is left of it; None if nothing is."""
    for number in range(DAMAGES):
        content = files[number % len(files)].read_bytes()
        yield files[number % len(files)], content[: draws.randrange(len(content))]
    yield from flips(files, draws)
    for path in files:
        yield path, None
        yield path, b""


def damage(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.reliability
@pytest.mark.bar(5)
def test_every_damage_is_detected_before_anything_changes(stopped, record_property):
    before, last = all_in(stopped)
    files, needed = files_of(last), shared(before)
    tried = 0
    for path, content in damages(files, random.Random(0)):
        whole, tried = path.read_bytes(), tried + 1
        damage(path, content)
        tree = contents(stopped)
        place, warned = told(stopped)
        both = str(path.relative_to(stopped)) in needed
        assert place == (None if both else before), path
        assert len(warned) == 1 + both, warned
        assert all(
            str(stopped) in line and ": " in line.removeprefix("damaged checkpoint skipped: ")
            for line in warned
        )
        assert path.name == "manifest.json" or all(path.name in line for line in warned), warned
        assert contents(stopped) == tree
        path.write_bytes(whole)
    assert told(stopped) == (last, [])
    record_property(
        "tried",
        f"{tried} damages to {len(files)} files, {len(needed)} of them shared by both checkpoints",
    )


@pytest.mark.reliability
@pytest.mark.bar(5)
@pytest.mark.parametrize("what", ["a bit", "a piece cut short", "no manifest"])
def test_a_run_goes_on_from_the_one_before_to_the_same_end(
    stopped, here, undisturbed, what, record_property
):
    before, last = all_in(stopped)
    (piece,) = set(shared(last)) - set(shared(before))
    agent = (last / "agent.safetensors").read_bytes()
    damage(*{
        "a bit": (last / "agent.safetensors", agent[:-9] + bytes([agent[-9] ^ 4]) + agent[-8:]),
        "a piece cut short": (stopped / piece, (stopped / piece).read_bytes()[:-100]),
        "no manifest": (last / "manifest.json", None),
    }[what])  # fmt: skip
    ended = trained(here)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("damaged checkpoint skipped") == 1
    assert hashes(stopped) == undisturbed[0]
    record_property("tried", f"{what}: resumed by the command line, one warning, equal hash")


@pytest.mark.reliability
@pytest.mark.bar(5)
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_with_nothing_valid_a_run_does_not_start_from_scratch(
    stopped, here, resume, record_property
):
    piece = stopped / sorted(shared(all_in(stopped)[0]))[0]
    damage(piece, piece.read_bytes()[:-1])
    tree = contents(here)
    ended = trained(here, f"run.resume={resume}")
    assert ended.returncode == CheckpointError.exit_code
    assert "none of 2 checkpoints is valid" in ended.stderr.splitlines()[-1]
    assert ended.stderr.count(piece.name) == 2
    assert contents(here) == tree
    record_property(
        "tried", f"a piece of both damaged, run.resume={resume}: code 3, nothing changed"
    )


@pytest.mark.control(5)
def test_seen_failing_without_hashes_a_flipped_bit_goes_unnoticed(stopped, monkeypatch):
    _, last = all_in(stopped)
    monkeypatch.setattr(checkpoint, "_check", lambda *_, **__: None)
    answers = []
    for path, content in flips(files_of(last), random.Random(0)):
        whole = path.read_bytes()
        damage(path, content)
        answers.append(told(stopped))
        path.write_bytes(whole)
    assert (last, []) in answers


# --- 6: kills within a save -----------------------------------------------------------------------

KILLS = [  # in this order on one run: before any save is complete, then after
    "archive.written:1", "archive.renamed:1", "checkpoint.arrays:1", "checkpoint.arrays:4",
    "checkpoint.written:1",
    "checkpoint.renamed:1", "checkpoint.pruned:1", "archive.written:1", "archive.renamed:1",
    "checkpoint.arrays:2",
    "checkpoint.written:1", "checkpoint.renamed:1", "checkpoint.aside:1", "checkpoint.pruned:2",
]  # fmt: skip


@pytest.mark.reliability
@pytest.mark.bar(6)
def test_killed_at_every_point_of_a_save(here, undisturbed, record_property):
    complete = 0
    for fault in KILLS:
        ended = trained(here, fault=fault)
        assert ended.returncode == -signal.SIGKILL, (fault, ended.stderr)
        place, warned = told(only(here))
        assert warned == []
        assert bool(place) == bool(complete or all_in(only(here))), fault
        complete += bool(place)
    assert complete >= 8
    assert trained(here).returncode == 0
    assert hashes(only(here)) == undisturbed[0]
    assert leftovers(only(here)) == []
    record_property(
        "tried",
        f"{len(KILLS)} kills by the command line, at {len({k[:-2] for k in KILLS})} points of a"
        " save",
    )


@pytest.mark.bar(6)
def test_killed_while_the_only_checkpoint_is_replaced(here, record_property):
    """Cover a last save with the name of the one before, which is moved aside for a moment."""
    words = ("run.save_every=600", "run.eval_every=700")
    assert run(*words, "run.folder=whole") == 0
    killed("checkpoint.aside:1", *words)
    folder = only(here)
    assert [path.name for path in all_in(folder)] == [".step_000000000600.old"]
    assert told(folder) == (all_in(folder)[0], [])
    assert run(*words) == 0
    assert hashes(folder) == hashes(next(here.glob("whole/*/seed_0")))
    assert [path.name for path in all_in(folder)] == ["step_000000000600"]
    record_property("tried", "killed between two renames, with one checkpoint only")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Record the calls that reach the disk from now on."""
    made: list[tuple[str, Path]] = []

    def watch(
        owner: Any, name: str, place: Any = lambda *arguments: Path(arguments[0]).absolute()
    ) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **options):
            made.append((name, place(*arguments)))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    watch(os, "rename", lambda source, target, **_: Path(target).absolute())
    watch(os, "unlink", lambda path, **_: Path(path).absolute())
    watch(shutil, "rmtree", lambda path, **_: Path(path).absolute())
    return made


@pytest.mark.bar(6)
def test_the_order_of_a_save(here, calls, record_property):
    """Write aside, flush, rename, flush the folder; only then remove older ones."""
    assert run() == 0
    folder = only(here)
    saves = [
        at
        for at, (name, path) in enumerate(calls)
        if name == "rename" and path.name.startswith("step_")
    ]
    assert len(saves) == 8  # the last two at the end, before and after the evaluation
    begin = 0
    for number, at in enumerate(saves):
        done, place = calls[begin:at], calls[at][1]
        beside = place.with_name(f".{place.name}.part")
        names = [
            "agent.safetensors",
            "episodes.safetensors",
            "facts.json",
            "manifest.json",
            "optimizers.safetensors",
        ]
        assert {("fsync", beside)} | {("fsync", beside / name) for name in names} <= set(done)
        pieces = [path for name, path in done if name == "rename" and path.parent.name == "replay"]
        assert len(pieces) == (number < 7)  # an evaluation adds nothing to the replay
        for piece in pieces:
            written = done.index(("fsync", piece.with_name(f".{piece.name}.part")))
            assert written < done.index(("rename", piece)) < done.index(("fsync", piece.parent))
        removed = [path for name, path in done if name in ("rmtree", "unlink") and path.exists()]
        assert not [
            path
            for path in removed
            if path.name.startswith("step_") or path.parent.name == "replay"
        ]
        after = calls[at + 1 :]
        flushed = after.index(("fsync", place.parent))
        pruned = [
            i
            for i, (name, path) in enumerate(after)
            if name == "rmtree" and path.name.startswith("step_")
        ]
        assert number in (0, 1, 7) or flushed < pruned[0]  # the last one replaces the one before
        begin = at
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[0] == "best"
    record_property("tried", "the order of fsync, rename and removal in eight saves of a run")


@pytest.mark.reliability
@pytest.mark.bar(6)
def test_a_save_writes_nothing_elsewhere(here, monkeypatch, record_property):
    """Compare with a first session, after which libraries keep some memory; a second one with five
    saves adds nothing.
    """
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        (here / name).mkdir()
        monkeypatch.setenv(name, str(here / name))
    assert trained(here, "run.steps_per_task=60").returncode == 0

    def elsewhere() -> dict[str, str]:
        return {
            name: hashed for name, hashed in contents(here).items() if not name.startswith("runs/")
        }

    before, cached = elsewhere(), contents(Path(os.environ["SOFTMOD_CACHE"]))
    assert trained(here).returncode == 0
    assert (elsewhere(), contents(Path(os.environ["SOFTMOD_CACHE"]))) == (before, cached)
    assert {path.parts[0] for path in map(Path, contents(only(here))) if len(path.parts) > 1} == {
        "checkpoints",
        "replay",
    }
    record_property(
        "tried", "working, home, cache and temporary folders equal before and after five saves"
    )


@pytest.mark.control(6)
def test_seen_failing_pruned_before_it_is_written(here, monkeypatch):
    save = checkpoint.save

    def early(folder: Path, *rest: Any) -> Path:
        for old in all_in(folder.parents[1]):
            shutil.rmtree(old)
        return save(folder, *rest)

    monkeypatch.setattr(checkpoint, "save", early)
    killed("checkpoint.written:4")
    assert told(only(here))[0] is None


# --- 7: disks that refuse -------------------------------------------------------------------------


def loud(ended: subprocess.CompletedProcess[str]) -> bool:
    """Return True if three attempts were logged, the last of which ended the run."""
    refused = [
        line
        for line in ended.stderr.splitlines()
        if "could not be written" in line or "is gone" in line
    ]
    last = ended.stderr.splitlines()[-1:] == refused[-1:]
    return ended.returncode == 4 and len(refused) == 3 and last and "Traceback" not in ended.stderr


@pytest.mark.reliability
@pytest.mark.bar(7)
def test_a_limit_on_the_size_of_files(stopped, here, undisturbed, record_property):
    last, before = all_in(stopped)[-1], hashes(stopped)
    size = (last / "agent.safetensors").stat().st_size
    assert (stopped / "journal.jsonl").stat().st_size < size * 4 // 5
    # Logged less often, so that the journal stays below the limit.
    ended = trained(here, *OFTEN, "run.log_every=600", limit=size - 1)
    assert loud(ended), ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("softmod: ")
    assert told(stopped) == (last, [])
    after = hashes(stopped)
    assert {name for name in before if before[name] != after[name]} <= {"metrics", "state"}
    assert trained(here).returncode == 0
    again = hashes(stopped)
    assert {name for name in again if again[name] != undisturbed[0][name]} <= {
        "metrics",
        "state",
    }  # logged more often
    record_property(
        "tried",
        f"files of at most {size - 1} bytes: reported three times, exit 4, then resumed to the"
        " same result",
    )


@pytest.mark.reliability
@pytest.mark.bar(7)
def test_a_limit_from_the_beginning_and_evaluations_first(here, record_property):
    """Fail to save the weights of the best evaluation too, which is logged and does not end the run
    yet.
    """
    ended = trained(here, "run.eval_every=60", "run.save_every=600", limit=15_000)
    assert loud(ended), ended.stderr
    assert all_in(only(here)) == []
    assert trained(here).returncode == 0
    record_property(
        "tried", "no file above 15,000 bytes, evaluations before saves: code 4 at the third"
    )


@pytest.mark.reliability
@pytest.mark.bar(7)
def test_the_folder_is_removed_in_the_middle_of_a_run(here, record_property):
    words = ["run.steps_per_task=9000", "run.save_every=300", "run.eval_every=90000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "softmod.train", *SMALL, *words]
    process = subprocess.Popen(
        line, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(here.glob("runs/*/seed_0/checkpoints/step_*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    folder = only(here)
    folder.rename(here / "gone")
    shutil.rmtree(here / "gone")
    out, err = process.communicate(timeout=120)
    assert loud(subprocess.CompletedProcess(line, process.returncode, out, err)), err
    assert not folder.exists()
    record_property(
        "tried",
        "the run's folder removed in the middle: reported three times, exit 4, not recreated",
    )


@pytest.mark.bar(7)
@pytest.mark.parametrize("lost", ["replay", "checkpoints", "."])
def test_what_is_removed_between_two_saves(here, monkeypatch, caplog, capsys, lost):
    """Remove pieces, which a checkpoint needs, and older checkpoints, which it does not need."""
    from softmod.checkpoint.saver import Saver

    save, saves = Saver.save, []

    def then_removed(self, *rest):
        saves.append(save(self, *rest))
        if len(saves) == 3:
            shutil.rmtree(self.run / lost)
        return saves[-1]

    monkeypatch.setattr(Saver, "save", then_removed)
    code = run(*OFTEN)
    if lost == "checkpoints":
        assert code == 0
        assert told(only(here)) == (all_in(only(here))[-1], [])
    else:
        assert code == 4
        assert (
            len(
                [
                    r
                    for r in caplog.records
                    if "the next attempt is at the next checkpoint" in r.message
                ]
            )
            == 2
        )
        assert "Traceback" not in capsys.readouterr().err


SWALLOWING = """
from softmod import train
from softmod.checkpoint import saver
from softmod.errors import SaveError
save = saver.Saver.save
def quiet(self, *rest):
    try:
        return save(self, *rest)
    except SaveError:
        return self.run
saver.Saver.save = quiet
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(7)
def test_seen_failing_errors_that_are_swallowed(stopped, here):
    limit = (all_in(stopped)[-1] / "agent.safetensors").stat().st_size - 1
    assert not loud(trained(here, *OFTEN, limit=limit, script=SWALLOWING))
