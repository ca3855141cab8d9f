"""A run as a few small files that travel: its newest checkpoint, its replay without what repeats,
its journal.

Arrays of the replay are packed exactly: a task's columns that never change are stored once, the
others as differences of their bits from row to row, byte by byte, which compress well.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.replay_files import FOLDER
from softmod.errors import CheckpointError, ConfigError, one_line
from softmod.system.files import digest, flush

MANIFEST = "packed.json"
FORMAT = 1
PART = 16 * 2**20  # bytes
PLAIN = (
    "config.yaml",
    "journal.jsonl",
    "result.json",
    "evaluation.json",
)  # of a run's folder, where they are
Bits = NDArray[np.uint32]


def pack(folder: Path, facts: dict[str, Any], output: Path, part: int = PART) -> list[Path]:
    """Write a whole checkpoint, and what its run needs to go on from it, as parts of at most `part`
    bytes.

    Returns:
        The files written.

    Raises:
        CheckpointError: the checkpoint holds weights only.
        ConfigError: `output` has files in it.
        SaveError: the disk refused.
    """
    if facts["kind"] != "whole":
        raise CheckpointError(
            f"{folder}: holds weights only; what a run goes on from is in a step_... checkpoint"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is no empty folder")
    run = folder.resolve().parent.parent
    with checkpoint.writing(output), tempfile.TemporaryFile() as whole:
        output.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in members(run, folder):
                bundle.writestr(name, content)
        hashes = {path.name: digest(path) for path in split(whole, output, part)}
        about = {"format": FORMAT, "run": f"{run.parent.name}/{run.name}", "parts": hashes}
        (output / MANIFEST).write_text(json.dumps(about, indent=1))
    return [output / name for name in (*hashes, MANIFEST)]


def members(run: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path in the run's folder, and the packed content, of every file that belongs to a
    checkpoint.
    """
    with checkpoint.reading(folder):
        best = run / "checkpoints" / "best"
        paths = [
            path for path in (*(run / name for name in PLAIN), *best.glob("*")) if path.is_file()
        ]
        contents = {
            path.relative_to(run): path.read_bytes()
            for path in (*paths, *folder.resolve().iterdir())
        }
        shared = checkpoint.shared(folder)
    yield from ((path.as_posix(), content) for path, content in contents.items())
    for name in shared:
        with checkpoint.reading(run / name):
            piece = (run / name).read_bytes()
        yield name, squeezed(piece)


def unpack(packed: Path, runs: Path) -> Path:
    """Make a run's folder of what `pack` wrote, in `runs` under the name that it had; return its
    checkpoint.

    Raises:
        CheckpointError: a part is missing or damaged; nothing is left behind.
        ConfigError: there is such a run already.
        SaveError: the disk refused.
    """
    about = manifest_of(packed)
    run = runs / about["run"]
    if run.exists():
        raise ConfigError(f"{run}: there is such a run already")
    beside = run.with_name(f".{run.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of an earlier attempt that was killed
    try:
        with checkpoint.writing(beside), tempfile.TemporaryFile() as whole:
            join(packed, about["parts"], whole)
            extract(whole, packed, beside)
            found = checkpoint.newest(beside)
            if found is None:
                raise CheckpointError(f"{packed}: there is no checkpoint in it")
            beside.rename(run)
            flush(run.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return run / found[0].relative_to(beside)


def extract(whole: IO[bytes], packed: Path, run: Path) -> None:
    """Write the files of a run.

    Raises:
        CheckpointError: the parts are no run.
        SaveError: the disk refused.
    """
    try:
        with zipfile.ZipFile(whole) as bundle:
            contents = ((name, bundle.read(name)) for name in bundle.namelist())
            for name, content in contents:
                write(run, name, expanded(content) if name.startswith(f"{FOLDER}/") else content)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        SafetensorError,
        ValueError,
        LookupError,
    ) as error:
        raise CheckpointError(f"{packed}: not what was packed ({one_line(error)})") from error


def manifest_of(packed: Path) -> dict[str, Any]:
    """Read and check the manifest.

    Raises:
        CheckpointError: there is none, or it is of another form.
    """
    path = packed / MANIFEST
    with checkpoint.reading(path):
        about: dict[str, Any] = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {about['format']}, this version reads {FORMAT}")
        folders = Path(about["run"]).parts
        parts = dict(about["parts"])
        names = [*folders, *parts]
        if (
            len(folders) != 2
            or not parts
            or any(Path(name).name != name or name == ".." for name in names)
        ):
            raise CheckpointError(f"{path}: names a file or a run elsewhere, or no parts")
    return about


def split(whole: IO[bytes], output: Path, part: int) -> list[Path]:
    """Write a file as parts."""
    whole.seek(0)
    paths: list[Path] = []
    while content := whole.read(part):
        paths.append(output / f"part_{len(paths):03d}")
        paths[-1].write_bytes(content)
    return paths


def join(packed: Path, parts: dict[str, str], whole: IO[bytes]) -> None:
    """Write parts as one file.

    Raises:
        CheckpointError: naming the part that is missing or damaged.
    """
    for name, hashed in parts.items():
        with checkpoint.reading(packed / name):
            content = (packed / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != hashed:
            raise CheckpointError(f"{packed / name}: its content is not what was packed")
        whole.write(content)


def write(run: Path, name: str, content: bytes) -> None:
    """Write a file of a run.

    Raises:
        CheckpointError: its path leads out of the run's folder.
        SaveError: the disk refused.
    """
    path = run / name
    if ".." in path.parts or Path(name).is_absolute():
        raise CheckpointError(f"{name}: leads out of the run's folder")
    with checkpoint.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        flush(path)


# --- arrays ---------------------------------------------------------------------------------------


def squeezed(piece: bytes) -> bytes:
    """Rewrite a piece of the replay in a form that compresses well."""
    arrays = {
        name: narrow(array) if array.ndim == 3 else array for name, array in load(piece).items()
    }
    return save(arrays)


def expanded(content: bytes) -> bytes:
    """Restore the piece, equal to the bit."""
    arrays = {
        name: widen(array) if array.dtype == np.uint8 else array
        for name, array in load(content).items()
    }
    return save(arrays)


def narrow(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Make bytes of `[task, row, column]`: its shape, and of each task the first row, what changes,
    and how.
    """
    parts = [np.array(array.shape, np.int64).tobytes()]
    for bits in array.view(np.uint32):
        changes = (bits != bits[:1]).any(0)
        steps = bits[1:, changes] ^ bits[:-1, changes]
        planes = (
            steps.T.copy()
            .view(np.uint8)
            .reshape(steps.shape[1], steps.shape[0], 4)
            .transpose(0, 2, 1)
        )
        parts += [bits[:1].tobytes(), changes.tobytes(), planes.tobytes()]
    return np.frombuffer(b"".join(parts), np.uint8)


def widen(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Make `[task, row, column]` of bytes."""
    tasks, rows, columns = packed[:24].view(np.int64)
    array = np.empty((tasks, rows, columns), np.uint32)
    at = 24
    for bits in array if rows else ():
        first = packed[at : at + 4 * columns].view(np.uint32)
        changes = packed[at + 4 * columns : at + 5 * columns] > 0
        at += 5 * columns
        count = int(changes.sum())
        size = 4 * count * (rows - 1)
        planes = packed[at : at + size].reshape(count, 4, rows - 1).transpose(0, 2, 1)
        at += size
        bits[:] = first
        steps = np.ascontiguousarray(planes).view(np.uint32).reshape(count, rows - 1).T
        bits[1:, changes] ^= np.bitwise_xor.accumulate(steps, 0)
    return array.view(np.float32)
