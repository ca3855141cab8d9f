"""A run's state from one instant: a folder of arrays (safetensors), JSON, and a manifest of hashes
written last.

Written beside its place, flushed to disk, then renamed; what is older goes only after that. No
pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
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
READABLE = (3, FORMAT)  # what holds weights alone did not change
KEPT = 2
ASIDE = ".old"  # how the name ends of what is being replaced
Arrays = dict[str, Tensor]
NONE: Mapping[str, str] = MappingProxyType({})


def save(
    folder: Path, groups: dict[str, Arrays], facts: dict[str, Any], shared: Mapping[str, str] = NONE
) -> Path:
    """Write a checkpoint: a `<group>.safetensors` for each group of arrays, `facts.json`,
    `manifest.json`.

    `shared` are files of the run that it needs too, with their hashes; their paths are relative to
    the run's folder.

    Raises:
        SaveError: the disk refused; whatever was at `folder` is untouched.
    """
    beside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(
            exist_ok=True
        )  # in a run's folder, which is not made again where somebody removed it
        beside.mkdir()
        for name, arrays in groups.items():
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in arrays.items()},
                beside / f"{name}.safetensors",
            )
            faults.point("checkpoint.arrays")
        (beside / "facts.json").write_text(json.dumps(facts, indent=1))
        files = {path.name: digest(path) for path in sorted(beside.iterdir())}
        manifest = {"format": FORMAT, "files": files, "shared": dict(shared)}
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*beside.iterdir(), beside]:
            flush(path)
        faults.point("checkpoint.written")
        _replace(beside, folder)
        faults.point("checkpoint.renamed")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise SaveError(f"{folder}: the checkpoint could not be written ({error})") from error
    return folder


def verify(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Check every file against the manifest; the facts.

    Args:
        folder: of the checkpoint.
        whole: check the replay too, which the checkpoint shares with others of its run. A policy
            needs the weights alone, which travel without it.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    manifest = _json(folder / "manifest.json")
    with reading(folder / "manifest.json"):
        if manifest["format"] not in READABLE:
            raise CheckpointError(
                f"{folder}: format {manifest['format']}, this version reads {FORMAT}"
            )
        for name, hashed in manifest["files"].items():
            _check(folder, name, hashed, folder, depth=1)
        run = folder.resolve().parent.parent
        for name, hashed in manifest["shared"].items() if whole else ():
            _check(folder, name, hashed, run, depth=2)
    facts = _json(folder / "facts.json")
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder / 'facts.json'}: holds no facts")
    return facts


def shared(folder: Path) -> dict[str, str]:
    """The run's files that a checkpoint shares with others, and their hashes; none if its manifest
    is unreadable.
    """
    try:
        with reading(folder):
            return dict(_json(folder / "manifest.json")["shared"])
    except CheckpointError:
        return {}


def _check(checkpoint: Path, name: str, hashed: str, root: Path, depth: int) -> None:
    """Check that a manifest's file lies inside its folder and has the hash that was saved."""
    parts = Path(name).parts
    path = root / name
    links = path.is_symlink() or (depth > 1 and path.parent.is_symlink())
    if len(parts) != depth or not set(parts).isdisjoint({"..", "/"}) or links:
        raise CheckpointError(
            f"{checkpoint}: the manifest names a file outside the checkpoint: {name}"
        )
    _there(path)
    if digest(path) != hashed:
        raise CheckpointError(f"{path}: its content is not what was saved")


def _there(path: Path) -> None:
    """Check that a path is a regular file, not a link."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{path}: {'is no plain file' if os.path.lexists(path) else 'is missing'}"
        )


def _json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: naming the file.
    """
    _there(path)
    with reading(path):
        return json.loads(path.read_text())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within this, what a file or a checkpoint lacks, or has in another form than a run saves it,
    is told as such.

    Raises:
        CheckpointError: instead of what Python and its libraries say.
    """
    try:
        yield
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path}: not what a run saves ({one_line(error)})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: unreadable ({one_line(error)})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this, a disk that refuses is told as such.

    Raises:
        SaveError: instead of what Python says.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path}: could not be written ({one_line(error)})") from error


def arrays(folder: Path, group: str) -> Arrays:
    """A group of a checkpoint's arrays.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = folder / f"{group}.safetensors"
    _there(path)
    with reading(path):
        return load_file(path)


def all_in(run: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first, unchecked.

    One that was being replaced when its run was killed lies aside, and counts.
    """
    aside = {
        path.name[1 : -len(ASIDE)]: path for path in (run / "checkpoints").glob(f".step_*{ASIDE}")
    }
    whole = {path.name: path for path in (run / "checkpoints").glob("step_*")}
    return [path for _, path in sorted((aside | whole).items())]


def versions(run: Path) -> dict[Path, str]:
    """The whole checkpoints of a run's folder, each with a hash that a new one in its place would
    change.
    """
    found = {}
    for path in all_in(run):
        with suppress(OSError):  # whoever trains may be replacing it
            found[path] = digest(path / "manifest.json")
    return found


def newest(run: Path, whole: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint and its facts; None if there never was one.

    Warns for each newer one that is damaged.

    Args:
        run: the run's folder.
        whole: as for `verify`.

    Raises:
        CheckpointError: there are checkpoints, and none is valid.
    """
    candidates = all_in(run)
    for folder in reversed(candidates):
        try:
            return folder, verify(folder, whole)
        except CheckpointError as error:
            logger.warning("damaged checkpoint passed over: %s: %s", folder.name, error)
    if candidates:
        raise CheckpointError(
            f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is valid"
        )
    return None


def prune(run: Path, saved: Path) -> None:
    """Keep the one that was just saved, and those before it; what is newer was found damaged when
    the run went on.
    """
    older = [folder for folder in all_in(run) if folder.name <= saved.name]
    for folder in set(all_in(run)) - set(older[-KEPT:]):
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in (run / "checkpoints").glob(".*"):  # of a save that a kill cut short
        shutil.rmtree(leftover, ignore_errors=True)


def optimizer_arrays(optimizers: list[Any]) -> Arrays:
    """The state of optimizers as arrays named `optimizer.parameter.key`."""
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

    Raises:
        CheckpointError: names or shapes differ; nothing was copied.
    """
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())[0]
        raise CheckpointError(
            f"the checkpoint's {what} is of another form: {odd} is only on one side"
        )
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint's {what} has {name} {list(saved[name].shape)}, not"
                f" {list(tensor.shape)}"
            )
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _replace(beside: Path, folder: Path) -> None:
    """Rename into place; an older folder of that name is moved aside first and removed last."""
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        faults.point("checkpoint.aside")
    beside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
