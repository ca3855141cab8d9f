"""The replay on disk: append-only pieces, shared by a run's checkpoints.

A checkpoint writes only the rows that are new since the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from softmod.agent.replay import Piece, Replay
from softmod.checkpoint.files import reading, write_arrays
from softmod.errors import CheckpointError, SaveError
from softmod.system import faults
from softmod.system.files import digest, flush

FOLDER = "replay"  # beside `checkpoints` in the run's folder


class Archive:
    """The pieces of a run's replay.

    A piece holds a range of rows and the entries of their episodes. Its name is
    `<first>-<last>.safetensors`, with rows counted per task since the start of the run; `last` is
    excluded. An episode that continues in the next piece has an entry in both; the later one
    counts.

    Args:
        run: the run's folder.
        replay: the replay to save and restore.
    """

    def __init__(self, run: Path, replay: Replay) -> None:
        self.folder = run / FOLDER
        self.replay = replay
        self.pieces: dict[str, str] = {}  # name and hash, oldest first

    def save(self) -> dict[str, str]:
        """Write the rows that no piece holds yet; return names and hashes of all pieces needed.

        Raises:
            SaveError: a piece cannot be written, or an earlier one is gone; existing pieces are
                untouched.
        """
        replay = self.replay
        for name in self.pieces:
            if not (self.folder / name).is_file():
                raise SaveError(f"{self.folder / name}: this piece of the replay is gone")
        first = max(self._last(), replay.first_row)
        if first < replay.written:
            name = f"{first:012d}-{replay.written:012d}.safetensors"
            self.pieces[name] = self._write(name, first)
        self.pieces = {
            name: hashed for name, hashed in self.pieces.items() if span(name)[1] > replay.first_row
        }
        return dict(self.pieces)

    def restore(self, pieces: Mapping[str, str], written: int) -> None:
        """Fill the replay from pieces.

        Args:
            pieces: names and hashes.
            written: rows per task that the run had written; the newest ones are restored.

        Raises:
            CheckpointError: a piece is unreadable or malformed, or rows are missing.
        """
        self.pieces = dict(pieces)
        self.replay.restore(oldest := max(0, written - self.replay.ring), self._since(oldest))
        if self.replay.written != written:
            raise CheckpointError(
                f"{self.folder}: pieces hold {self.replay.written} rows per task; must be {written}"
            )

    def _since(self, oldest: int) -> Iterator[Piece]:
        """Yield the pieces, checked, oldest first, without rows older than `oldest`.

        Raises:
            CheckpointError: a piece is unreadable or malformed, or rows are missing.
        """
        replay = self.replay
        tasks, _, width = replay.rows.shape
        for name in sorted(self.pieces):
            first, last = span(name)
            piece = self._read(name)
            expected = [
                [tasks, last - first, width],
                [tasks],
                [tasks, piece.episodes.shape[1], replay.spec.obs_dim],
            ]
            shapes = [list(part.shape) for part in piece]
            if shapes != expected:
                raise CheckpointError(
                    f"{self.folder / name}: has shapes {shapes}; must be {expected}"
                )
            if first > replay.written:
                raise CheckpointError(
                    f"{self.folder}: no piece holds the rows from {replay.written} to {first}"
                )
            yield piece._replace(rows=piece.rows[:, max(0, oldest - first) :])

    def prune(self, needed: Iterable[str]) -> None:
        """Remove all files except the needed ones.

        Args:
            needed: names of the pieces that the kept checkpoints refer to.
        """
        kept = set(needed)
        for path in self.folder.glob("*"):
            if path.name not in kept:
                with suppress(OSError):  # a leftover file is harmless
                    path.unlink()

    def _last(self) -> int:
        return max((span(name)[1] for name in self.pieces), default=0)

    def _write(self, name: str, first: int) -> str:
        """Write the rows from `first` on atomically; return the hash.

        Raises:
            SaveError: the piece cannot be written.
        """
        piece = self.replay.since(first)
        temporary = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.unlink(missing_ok=True)
            write_arrays(temporary, piece._asdict())
            hashed = digest(temporary)
            flush(temporary)
            faults.point("archive.written")
            temporary.rename(self.folder / name)
            flush(self.folder)
            faults.point("archive.renamed")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise SaveError(f"{self.folder / name}: could not be written ({error})") from error
        return hashed

    def _read(self, name: str) -> Piece:
        with reading(self.folder / name):
            parts = load_file(self.folder / name)
        if parts.keys() != set(Piece._fields):
            raise CheckpointError(
                f"{self.folder / name}: written by another version of softmod; resume with that"
                " version, or start a new run"
            )
        return Piece(**parts)


def span(name: str) -> tuple[int, int]:
    """Return the first row of a piece and the row after its last, from its name.

    Raises:
        CheckpointError: this is not the name of a piece.
    """
    first, dash, last = name.removesuffix(".safetensors").partition("-")
    if not (name.endswith(".safetensors") and dash and first.isdecimal() and last.isdecimal()):
        raise CheckpointError(f"{name}: not the name of a piece of the replay")
    return int(first), int(last)
