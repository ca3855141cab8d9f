"""Which file system a path lies on."""

from __future__ import annotations

from pathlib import Path

import pytest

from softmod.system.files import network_file_system

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
