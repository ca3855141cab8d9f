"""Which file system a path lies on, and what it can flush."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from softmod.system.files import flush, network_file_system

MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
36 22 0:40 /exports/home /home rw,noatime master:1 - nfs4 server:/exports/home rw
37 22 0:41 / /scratch\\040space rw - lustre 10.0.0.1@tcp:/lustre rw
38 36 254:2 / /home/me/local rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/mlflow.db", None),
        ("/home/me/mlflow.db", "nfs4"),
        ("/home/me/local/mlflow.db", None),
        ("/homely/mlflow.db", None),
        ("/scratch space/a/mlflow.db", "lustre"),
    ],
)
def test_network_file_systems_are_found(tmp_path: Path, path: str, kind: str | None):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert network_file_system(Path(path), mounts) == kind


def test_other_systems_have_no_list(tmp_path: Path):
    assert network_file_system(Path("/home"), tmp_path / "none") is None


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("name", ["EBADF", "EISDIR", "EACCES", "EPERM", "ENOTTY", "EINVAL"])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, call: str, name: str):
    (tmp_path / "file").touch()
    refuse(monkeypatch, call, getattr(errno, name))
    flush(tmp_path)
    if name != "EINVAL":
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
            flush(tmp_path / "file")


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EROFS"])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, call: str, name: str):
    refuse(monkeypatch, call, getattr(errno, name))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        flush(tmp_path)
