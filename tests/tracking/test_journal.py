"""The journal: what it stores, what it rejects, what it survives."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softmod.errors import ConfigError, SaveError
from softmod.system.hardware import Usage, environment_tags
from softmod.tracking import journal as tracking
from softmod.tracking import names
from softmod.tracking.journal import Journal
from softmod.tracking.record import JOURNAL, Record, lines
from softmod.tracking.redact import redacted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "toy-abc" / "seed_0"


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    opened = Journal(folder)
    yield opened
    opened.close()


def again(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.folder)


def raw(folder: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / JOURNAL).read_text().splitlines()
    ]


def test_round_trip(journal: Journal, folder: Path) -> None:
    journal.params(
        {"env": {"name": "toy", "tasks": ("a", "b")}, "lr": 3e-4, "none": None, "limit": math.inf}
    )
    journal.tags({"softmod.name": "toy"})
    journal.metrics({"x": 0.1 + 0.2, "y": math.nan, "up": math.inf, "down": -math.inf}, step=10)
    journal.metrics({"x": 2}, step=5)
    journal.artifact(folder / "config.yaml", under="a")
    journal.status("FINISHED")
    assert [line["kind"] for line in raw(folder)] == [
        "header", "session", "params", "tags", "metrics", "metrics", "artifact", "status"
    ]  # fmt: skip
    record = Record.read(folder)
    assert record == journal.record or math.isnan(record.values["y"].pop(10))
    assert record.params == {
        "env.name": "toy",
        "env.tasks": ["a", "b"],
        "lr": 3e-4,
        "none": None,
        "limit": "inf",
    }
    assert record.history("x") == [(5, 2.0), (10, 0.1 + 0.2)]
    assert (record.values["up"][10], record.values["down"][10]) == (math.inf, -math.inf)
    assert (record.run_id, record.status, record.tags) == (
        journal.run_id,
        "FINISHED",
        {"softmod.name": "toy"},
    )
    assert len(record.run_id) == 32


def test_a_resumed_run_keeps_its_identity_and_writes_only_what_is_new(
    journal: Journal, folder: Path
) -> None:
    journal.params({"steps": 100, "lr": 1.0})
    journal.tags({"a": "1"})
    journal.metrics({"x": 1.0, "n": math.nan}, step=1)
    before = (folder / JOURNAL).read_bytes()
    resumed = again(journal)
    resumed.params({"steps": 200, "lr": 1.0})
    resumed.tags({"a": "1"})
    resumed.metrics({"x": 1.0, "n": math.nan}, step=1)
    resumed.metrics({"x": 2.0, "n": math.nan}, step=2)
    resumed.metrics({"x": 2.0}, step=2)
    resumed.close()
    assert (folder / JOURNAL).read_bytes().startswith(before)
    assert [line.get("values", line["kind"]) for line in raw(folder)[5:]] == [
        "session", {"steps": 200}, {"x": 2.0, "n": "nan"}
    ]  # fmt: skip
    assert resumed.run_id == journal.run_id == raw(folder)[0]["run_id"]


def test_a_value_that_differs_is_told_once_per_name(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.metrics({"loss": 1.0, "same": 1.0, "time/rate": 1.0, "system/memory_gib": 1.0}, step=1)
    journal.metrics({"loss": 1.0}, step=2)
    for step in (1, 2):
        journal.metrics(
            {"loss": 1.0000001, "same": 1.0, "time/rate": 9.0, "system/memory_gib": 9.0}, step=step
        )
    assert [record.args[0] for record in caplog.records] == ["loss"]  # type: ignore[index]
    assert journal.history("loss") == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("cut", [1, 2, 30, 1_000_000])
def test_a_torn_last_line_is_tolerated(journal: Journal, folder: Path, cut: int) -> None:
    """Count a last line that lacks only its newline; ignore one that is cut within."""
    journal.metrics({"x": 1.0}, step=1)
    journal.metrics({"x": 2.0}, step=2)
    journal.close()
    path = folder / JOURNAL
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    os.truncate(path, path.stat().st_size - min(cut, last))
    assert [step for step, _ in Record.read(folder).history("x")] == [1]
    resumed = Journal(folder)
    assert [step for step, _ in resumed.history("x")] == ([1, 2] if cut == 1 else [1])
    resumed.metrics({"x": 2.0}, step=2)
    resumed.metrics({"x": 3.0}, step=3)
    resumed.close()
    record = Record.read(folder)
    assert record.history("x") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert record.run_id == journal.run_id
    assert sum("x" in line.get("values", {}) for line, _ in lines(path)) == 3


def test_a_torn_header_makes_a_new_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_text('{"kind":"header","sch')
    journal = Journal(folder)
    journal.close()
    assert Record.read(folder).run_id == journal.run_id != ""


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        '{"kind":"metrics"}',
        '{"kind":"metrics","time":1,"step":9,"values":{"x":"boo"}}',
        '"x"',
        "\x00\xff",
        "{}",
    ],
)
def test_damaged_lines_are_passed_over(journal: Journal, folder: Path, damage: str) -> None:
    journal.metrics({"x": 1.0}, step=1)
    with (folder / JOURNAL).open("a", encoding="latin1") as file:
        file.write(damage + "\n")
    resumed = again(journal)
    resumed.metrics({"x": 2.0}, step=2)
    resumed.close()
    assert Record.read(folder).history("x") == [(1, 1.0), (2, 2.0)]


def test_a_journal_of_a_newer_version_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_text('{"kind":"header","time":1,"schema":2,"run_id":"a"}\n')
    with pytest.raises(ConfigError, match="newer"):
        Journal(folder)
    with pytest.raises(ConfigError, match="newer"):  # and not: in use
        Journal(folder)


def test_one_process_per_folder(journal: Journal, folder: Path) -> None:
    code = (
        f"import pathlib, softmod.tracking.journal as t; t.Journal(pathlib.Path({str(folder)!r}))"
    )
    second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert f"{folder}: run folder in use by process {os.getpid()}" in second.stderr
    assert tracking.in_use(folder)
    journal.close()
    journal.close()
    assert not tracking.in_use(folder)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert sum(line["kind"] == "session" for line in raw(folder)) == 2


def test_a_full_disk_loses_nothing_and_ends_the_run_at_the_third_time(
    journal: Journal,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = os.write

    def half(fd: int, data: bytes) -> int:
        return write(fd, data[: len(data) // 2])

    def none(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    journal.metrics({"x": 1.0}, step=1)
    monkeypatch.setattr(os, "write", none)
    journal.metrics({"x": 2.0}, step=2)
    assert len(caplog.records) == 2
    monkeypatch.setattr(os, "write", write)
    journal.metrics({"x": 3.0}, step=3)
    assert Record.read(folder).history("x") == [(1, 1.0), (2, 2.0), (3, 3.0)]

    monkeypatch.setattr(os, "write", none)
    journal.metrics({"x": 4.0}, step=4)
    with pytest.raises(SaveError):
        journal.sync()  # what must be on the disk now is not
    with pytest.raises(SaveError, match="No space left"):
        journal.metrics({"x": 5.0}, step=5)
    journal.status("FAILED")  # on the way out: does not hide what ended the run
    monkeypatch.setattr(os, "write", write)
    journal.close()
    record = Record.read(folder)
    assert [step for step, _ in record.history("x")] == [1, 2, 3, 4, 5]
    assert record.status == "FAILED"


def test_an_artifact_lies_in_the_run_folder(journal: Journal, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="subpath"):
        journal.artifact(tmp_path / "passwords")
    with pytest.raises(ValueError, match="subpath"):
        journal.artifact(folder / ".." / "seed_1" / "x")
    with pytest.raises(ValueError, match="DONE"):
        journal.status("DONE")


@pytest.mark.bar(23)
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:hunter2@host:5432/db", "postgresql://***@host:5432/db"),
        ("tracking.uri=https://me:hun@ter/2@host/x", "tracking.uri=https://***@host/x"),
        ("https://hunter2@host", "https://***@host"),
        (
            "postgresql://host/db?user=me&password=hunter2&ssl=1",
            "postgresql://host/db?user=me&password=***&ssl=1",
        ),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_passwords_are_struck_out(journal: Journal, folder: Path, text: str, clean: str) -> None:
    assert redacted(text) == clean == redacted(clean)
    journal.params({"tracking": {"uri": text, "list": [text]}})
    journal.tags({"uri": text})
    assert "hunter2" not in (folder / JOURNAL).read_text()


def test_what_it_tells_of_the_machine() -> None:
    tags = environment_tags()
    assert {
        "version.python",
        "version.torch",
        "version.metaworld",
        "version.mujoco",
        "version.mlflow",
    } <= tags.keys()
    if "softmod.commit" in tags:
        assert len(tags["softmod.commit"]) == 40
        assert tags["softmod.dirty"] in ("true", "false")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            usage = Usage(busy.pid)
            first = usage.read()
            time.sleep(0.5)
            values = usage.read()
        finally:
            busy.kill()
    assert "cpu_percent" not in first
    assert 10.0 < values["cpu_percent"] < 200.0
    assert 0.001 < values["memory_gib"] < 50.0
    assert f"{names.USAGE}memory_gib".startswith(names.WALL_CLOCK)
    assert Usage(2**22 + 1).read() == {}


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, softmod.tracking.journal, softmod.tracking.uploader, softmod.upload;"
    code += "print([name for name in ('torch', 'mlflow', 'matplotlib') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
