"""The limits of control groups, of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from softmod.system import control_group, hardware


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a hierarchy of groups, from the files of each folder."""

    def make(own: str, files: dict[str, str]) -> None:
        root = tmp_path / "cgroup"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(control_group, "ROOT", root)
        monkeypatch.setattr(control_group, "OWN", tmp_path / "own")

    return make


def test_version_two_takes_the_smallest_limit_on_the_way_up(groups):
    groups("0::/jobs/mine\n", {
        "jobs/cpu.max": "150000 100000", "jobs/memory.max": "3000000",
        "jobs/mine/cpu.max": "max 100000", "jobs/mine/memory.max": "max",
        "jobs/mine/memory.high": "2000000",
    })  # fmt: skip
    assert control_group.cores() == 1.5
    assert control_group.memory() == 2_000_000


def test_version_one(groups):
    groups("4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/box\n", {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "50000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/box/memory.limit_in_bytes": "1073741824",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    })  # fmt: skip
    assert control_group.cores() == 0.5
    assert control_group.memory() == 2**30


@pytest.mark.parametrize("own", ["0::/\n", "0::/gone/../elsewhere\n", "", "nonsense"])
def test_no_limit(own, groups):
    groups(own, {"cpu.max": "max 100000", "memory.max": "max"})
    assert control_group.cores() is None
    assert control_group.memory() is None


def test_the_machine_is_seen_within_its_limits(groups):
    groups("0::/\n", {"cpu.max": "50000 100000", "memory.max": "1073741824"})
    assert hardware.available() == 1
    assert hardware.memory() == 2**30
    groups("0::/\n", {"cpu.max": "99900000 100000", "memory.max": "max"})
    assert hardware.available() <= 999
    assert hardware.memory() > 2**30


def test_a_replay_larger_than_the_limit_is_refused(groups, tmp_path, monkeypatch):
    from softmod import train

    monkeypatch.chdir(tmp_path)
    groups("0::/\n", {"memory.max": "104857600"})
    assert train.run(["experiment=toy", "run.replay_per_task=5_000_000"]) == 2
    assert not (tmp_path / "runs").exists()
