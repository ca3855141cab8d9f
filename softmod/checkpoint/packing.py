"""A run packed for transfer: a whole checkpoint, its replay compressed, its journal.

The replay is compressed without loss. Columns of a task that never change are stored once. The
others are stored as the XOR of successive rows, split into byte planes, which compress well.
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
PLAIN = (  # files of a run's folder that are packed as they are, if they exist
    "config.yaml",
    "journal.jsonl",
    "result.json",
    "evaluation.json",
)
Bits = NDArray[np.uint32]


def pack(folder: Path, metadata: dict[str, Any], output: Path, part: int = PART) -> list[Path]:
    """Write a whole checkpoint, and all that its run needs to resume from it, as parts.

    Args:
        folder: the checkpoint's folder.
        metadata: the checkpoint's metadata.
        output: an empty or missing folder.
        part: maximum size of a part, in bytes.

    Returns:
        The files written.

    Raises:
        CheckpointError: the checkpoint holds weights only.
        ConfigError: `output` is not empty.
        SaveError: a file cannot be written.
    """
    if metadata["kind"] != "whole":
        raise CheckpointError(
            f"{folder}: holds weights only; a run resumes from a step_... checkpoint"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: must be an empty or missing folder")
    run = folder.resolve().parent.parent
    with checkpoint.writing(output), tempfile.TemporaryFile() as whole:
        output.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in members(run, folder):
                bundle.writestr(name, content)
        hashes = {path.name: digest(path) for path in split(whole, output, part)}
        manifest = {"format": FORMAT, "run": f"{run.parent.name}/{run.name}", "parts": hashes}
        (output / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return [output / name for name in (*hashes, MANIFEST)]


def members(run: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and packed content of each file that belongs to a checkpoint.

    Args:
        run: the run's folder; paths are relative to it.
        folder: the checkpoint's folder.

    Raises:
        CheckpointError: a file is unreadable.
    """
    with checkpoint.reading(folder):
        best = run / "checkpoints" / "best"
        optional = [*(run / name for name in PLAIN), *best.glob("*")]
        paths = [*(path for path in optional if path.is_file()), *folder.resolve().iterdir()]
        contents = {path.relative_to(run): path.read_bytes() for path in paths}
        shared = checkpoint.shared(folder)
    yield from ((path.as_posix(), content) for path, content in contents.items())
    for name in shared:
        with checkpoint.reading(run / name):
            piece = (run / name).read_bytes()
        yield name, squeezed(piece)


def unpack(packed: Path, runs: Path) -> Path:
    """Restore a packed run under its original name; return its checkpoint.

    Args:
        packed: folder that `pack` wrote.
        runs: folder that holds all runs.

    Raises:
        CheckpointError: a part is missing or damaged; nothing is left behind.
        ConfigError: the run exists already.
        SaveError: a file cannot be written.
    """
    manifest = manifest_of(packed)
    run = runs / manifest["run"]
    if run.exists():
        raise ConfigError(f"{run}: exists already; remove it, or unpack into another folder")
    temporary = run.with_name(f".{run.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier attempt that was killed
    try:
        with checkpoint.writing(temporary), tempfile.TemporaryFile() as whole:
            join(packed, manifest["parts"], whole)
            extract(whole, packed, temporary)
            found = checkpoint.newest(temporary)
            if found is None:
                raise CheckpointError(f"{packed}: contains no checkpoint")
            temporary.rename(run)
            flush(run.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run / found[0].relative_to(temporary)


def extract(whole: IO[bytes], packed: Path, run: Path) -> None:
    """Write the files of a run.

    Args:
        whole: the joined parts.
        packed: the folder they are from, for messages.
        run: folder to write to.

    Raises:
        CheckpointError: the parts do not form a packed run.
        SaveError: a file cannot be written.
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
        raise CheckpointError(f"{packed}: malformed content ({one_line(error)})") from error


def manifest_of(packed: Path) -> dict[str, Any]:
    """Read and check the manifest of a packed run.

    Raises:
        CheckpointError: it is missing or malformed, or names paths outside its folders.
    """
    path = packed / MANIFEST
    with checkpoint.reading(path):
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {manifest['format']}; this version reads {FORMAT}"
            )
        folders = Path(manifest["run"]).parts
        parts = dict(manifest["parts"])
        names = [*folders, *parts]
        if (
            len(folders) != 2
            or not parts
            or any(Path(name).name != name or name == ".." for name in names)
        ):
            raise CheckpointError(f"{path}: names no parts, or a path outside its folders")
    return manifest


def split(whole: IO[bytes], output: Path, part: int) -> list[Path]:
    """Write a file as parts of at most `part` bytes; return their paths."""
    whole.seek(0)
    paths: list[Path] = []
    while content := whole.read(part):
        paths.append(output / f"part_{len(paths):03d}")
        paths[-1].write_bytes(content)
    return paths


def join(packed: Path, parts: dict[str, str], whole: IO[bytes]) -> None:
    """Write parts as one file.

    Raises:
        CheckpointError: a part is missing or damaged; the message names it.
    """
    for name, hashed in parts.items():
        with checkpoint.reading(packed / name):
            content = (packed / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != hashed:
            raise CheckpointError(f"{packed / name}: does not match the hash in the manifest")
        whole.write(content)


def write(run: Path, name: str, content: bytes) -> None:
    """Write a file of a run.

    Raises:
        CheckpointError: its path is outside the run's folder.
        SaveError: the file cannot be written.
    """
    path = run / name
    if ".." in path.parts or Path(name).is_absolute():
        raise CheckpointError(f"{name}: is outside the run's folder")
    with checkpoint.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        flush(path)


# --- arrays ---------------------------------------------------------------------------------------


def squeezed(piece: bytes) -> bytes:
    """Transform a piece of the replay into a form that compresses well."""
    arrays = {
        name: narrow(array) if array.ndim == 3 else array for name, array in load(piece).items()
    }
    return save(arrays)


def expanded(content: bytes) -> bytes:
    """Invert `squeezed`, bit for bit."""
    arrays = {
        name: widen(array) if array.dtype == np.uint8 else array
        for name, array in load(content).items()
    }
    return save(arrays)


def narrow(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode `[task, row, column]` as bytes.

    The bytes hold the shape, and for each task the first row, a mask of the columns that change,
    and the byte planes of their XOR from row to row.
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
    """Decode `[task, row, column]` from the bytes of `narrow`."""
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
