"""Checkpoints on disk: a folder of arrays (safetensors), JSON metadata, and a manifest of hashes.

A checkpoint is written to a temporary folder, flushed to disk, then renamed. Older checkpoints are
removed only after that. No pickle is read or written.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softmod.errors import CheckpointError, SaveError, one_line
from softmod.system import faults
from softmod.system.files import digest, flush

logger = logging.getLogger(__name__)

FORMAT = 4
READABLE = (3, FORMAT)  # weights have the same form in both
KEPT = 2  # whole checkpoints per run
ASIDE = ".old"  # suffix of a checkpoint that is being replaced
# names of whole checkpoints, and of what a killed save leaves; other names are the user's
WHOLE = re.compile(r"step_\d{12}")
MOVED = re.compile(rf"\.step_\d{{12}}{re.escape(ASIDE)}")
LEFTOVER = re.compile(r"\.(step_\d{12}|best)(\.old|\.part)+")
Arrays = dict[str, Tensor]
NONE: Mapping[str, str] = MappingProxyType({})


def save(
    folder: Path,
    groups: dict[str, Arrays],
    metadata: dict[str, Any],
    shared: Mapping[str, str] = NONE,
) -> Path:
    """Write a checkpoint atomically; return its folder.

    It holds a `<group>.safetensors` for each group of arrays, `facts.json` with the metadata, and
    `manifest.json`.

    Args:
        folder: the checkpoint's folder; replaced if it exists.
        groups: arrays by group and name.
        metadata: JSON values.
        shared: files of the run that the checkpoint refers to, by their paths relative to the run's
            folder, with their hashes.

    Raises:
        SaveError: the checkpoint cannot be written; an existing `folder` is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(exist_ok=True)  # no parents: a removed run's folder stays removed
        temporary.mkdir()
        for name, arrays in groups.items():
            write_arrays(temporary / f"{name}.safetensors", arrays)
            faults.point("checkpoint.arrays")
        (temporary / "facts.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        files = {path.name: digest(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "files": files, "shared": dict(shared)}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        faults.point("checkpoint.written")
        _replace(temporary, folder)
        faults.point("checkpoint.renamed")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"{folder}: the checkpoint could not be written ({error})") from error
    return folder


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays to a safetensors file that has the permissions of every new file.

    By itself, safetensors gives a file to its owner alone.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)  # the umask is not read: that is not thread-safe
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in arrays.items()}, path)
    if stat.S_IMODE(path.stat().st_mode) != usual:
        path.chmod(usual)


def verify(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest; return the metadata.

    Args:
        folder: of the checkpoint.
        whole: check the replay too, which the checkpoint shares with others of its run. A policy
            needs the weights alone, which travel without it.

    Raises:
        CheckpointError: a file is missing, damaged or not allowed; the message names it.
    """
    manifest = _json(folder / "manifest.json")
    with reading(folder / "manifest.json"):
        if manifest["format"] not in READABLE:
            raise CheckpointError(
                f"{folder}: format {manifest['format']}; this version reads {FORMAT}"
            )
        for name, hashed in manifest["files"].items():
            _check(folder, name, hashed, folder, depth=1)
        run = folder.resolve().parent.parent
        for name, hashed in manifest["shared"].items():
            _check_name(folder, name, depth=2)
            if whole:
                _check(folder, name, hashed, run, depth=2)
    metadata = _json(folder / "facts.json")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{folder / 'facts.json'}: must be a JSON object")
    return metadata


def shared(folder: Path) -> dict[str, str]:
    """Return the run's files that a checkpoint shares with others, with their hashes.

    Empty if the manifest is unreadable.
    """
    try:
        with reading(folder):
            return dict(_json(folder / "manifest.json")["shared"])
    except CheckpointError:
        return {}


def _check(checkpoint: Path, name: str, hashed: str, root: Path, depth: int) -> None:
    """Check that a file of the manifest lies inside `root` and has the saved hash.

    Args:
        checkpoint: folder of the checkpoint, for messages.
        name: path relative to `root`.
        hashed: saved hash.
        root: folder that must contain the file.
        depth: number of components that the path must have.

    Raises:
        CheckpointError: the file is outside `root`, missing, or changed.
    """
    _check_name(checkpoint, name, depth)
    path = root / name
    if depth > 1 and path.parent.is_symlink():
        raise CheckpointError(f"{path.parent}: is a link")
    _check_regular(path)
    if digest(path) != hashed:
        raise CheckpointError(f"{path}: does not match the hash in the manifest")


def _check_name(checkpoint: Path, name: str, depth: int) -> None:
    """Check that a name of the manifest leads nowhere else; the parameters are those of `_check`.

    Raises:
        CheckpointError: it does.
    """
    parts = Path(name).parts
    if len(parts) != depth or not set(parts).isdisjoint({"..", "/"}):
        raise CheckpointError(
            f"{checkpoint}: the manifest names a file outside the checkpoint: {name}"
        )


def _check_regular(path: Path) -> None:
    """Check that a path is a regular file, not a link.

    Raises:
        CheckpointError: it is not.
    """
    with reading(path):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{path}: is missing") from error
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is not a regular file")


def _json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or unreadable; the message names it.
    """
    _check_regular(path)
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors from reading a file or a checkpoint within this context.

    Raises:
        CheckpointError: content is missing, malformed or unreadable.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise CheckpointError(f"{error.filename or path}: cannot be read ({reason})") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path}: malformed content ({one_line(error)})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: unreadable ({one_line(error)})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors from writing a file within this context.

    Raises:
        SaveError: the file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path}: could not be written ({one_line(error)})") from error


def arrays(folder: Path, group: str) -> Arrays:
    """Read a group of a checkpoint's arrays.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = folder / f"{group}.safetensors"
    _check_regular(path)
    with reading(path):
        return load_file(path)


def all_in(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run's folder, oldest first, unverified.

    This includes one that was moved aside for replacement when the run was killed, before the one
    in its place.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    names = [name for name in _names(run) if WHOLE.fullmatch(name) or MOVED.fullmatch(name)]
    names.sort(key=lambda name: (name.removeprefix(".").removesuffix(ASIDE), name))
    return [run / "checkpoints" / name for name in names]


def _names(run: Path) -> list[str]:
    """Return the names in a run's folder of checkpoints; none if there is no such folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(run / "checkpoints"):
        try:
            return os.listdir(run / "checkpoints")
        except (FileNotFoundError, NotADirectoryError):
            return []


def versions(run: Path) -> dict[Path, str]:
    """Return the whole checkpoints of a run's folder, each with the hash of its manifest."""
    found = {}
    for path in all_in(run):
        with suppress(OSError):  # a training process may be replacing it
            found[path] = digest(path / "manifest.json")
    return found


def newest(run: Path, whole: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest valid checkpoint and its metadata; None if there are no checkpoints.

    Logs a warning for each newer one that is damaged. One that this user may not read is an error.

    Args:
        run: the run's folder.
        whole: as for `verify`.

    Raises:
        CheckpointError: there are checkpoints, and none is valid or permitted to be read.
    """
    candidates = all_in(run)
    for folder in reversed(candidates):
        try:
            return folder, verify(folder, whole)
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            logger.warning("damaged checkpoint skipped: %s: %s", folder.name, error)
    if candidates:
        raise CheckpointError(
            f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is valid"
        )
    return None


def prune(run: Path, saved: Path) -> None:
    """Remove all but the last `KEPT` whole checkpoints up to the one just saved.

    Newer ones were found damaged when the run resumed, and are removed too.
    """
    whole = sorted(name for name in _names(run) if WHOLE.fullmatch(name))
    older = [name for name in whole if name <= saved.name]
    killed = [name for name in _names(run) if LEFTOVER.fullmatch(name)]
    for name in {*whole, *killed} - set(older[-KEPT:]):
        shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)


def optimizer_arrays(optimizers: list[Any]) -> Arrays:
    """Return the state of optimizers as arrays named `optimizer.parameter.key`."""
    return {
        f"{i}.{j}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for j, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def restore_arrays(live: Arrays, saved: Arrays, what: str) -> None:
    """Copy saved arrays into live ones, in place.

    Args:
        live: the arrays to overwrite.
        saved: the arrays to copy.
        what: kind of the arrays, for messages.

    Raises:
        CheckpointError: names or shapes differ; nothing was copied.
    """
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())[0]
        problem = "missing" if odd in live else "unexpected"
        raise CheckpointError(f"{what} in the checkpoint: {odd} is {problem}")
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"{what} in the checkpoint: {name} has shape {list(saved[name].shape)}; must be"
                f" {list(tensor.shape)}"
            )
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _replace(temporary: Path, folder: Path) -> None:
    """Rename to the final name; an existing folder is moved aside first and removed last."""
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        _move(folder, aside)
        faults.point("checkpoint.aside")
    temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _move(folder: Path, aside: Path) -> None:
    """Rename a folder, or copy it where the file system cannot; either name holds all of it.

    Overlay file systems cannot rename a folder that comes from an image.
    """
    try:
        folder.rename(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = aside.with_name(f"{aside.name}.part")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        for path in [*copy.iterdir(), copy]:
            flush(path)
        copy.rename(aside)
        shutil.rmtree(folder)
