"""The figure of success rates."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from softmod.tracking import names
from softmod.tracking.figures import success_figure
from softmod.tracking.journal import Journal


@pytest.mark.parametrize("tasks", [0, 1, 10, 50])
def test_success_figure(tmp_path: Path, tasks: int) -> None:
    journal = Journal(tmp_path)
    for step in range(0, 1000, 100):
        values = {
            names.success_rate(f"task-{i}-v3"): min(1.0, step * i / 10_000) for i in range(tasks)
        }
        journal.metrics(values | {names.SUCCESS_MEAN: step / 1000} if tasks else {}, step)
    success_figure(journal, tmp_path / "success.png")
    journal.close()
    data = (tmp_path / "success.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1350, 720)
    empty, drawn = 20_000, 35_000
    assert len(data) > (drawn if tasks else empty)
