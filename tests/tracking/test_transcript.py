"""`train.log`: the lines that a run printed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from softmod.spec import TaskScore
from softmod.tracking.console import Progress, print_table
from softmod.tracking.transcript import TRANSCRIPT, Transcript


def test_lines_and_tables_are_appended_without_passwords(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for session in (1, 2):
        Transcript(tmp_path).begin(f"session {session} of http://me:hunter2@host")
    transcript = Transcript(tmp_path)
    Progress(10, transcript=transcript).say("a line")
    print_table([TaskScore("reach-v3", 0.5, 10.0, 2)], "a title", transcript)
    text = (tmp_path / TRANSCRIPT).read_text()
    assert "hunter2" not in text
    assert [line.split("  ")[1] for line in text.splitlines()[:2]] == [
        "session 1 of http://***@host",
        "session 2 of http://***@host",
    ]
    printed = capsys.readouterr()
    assert "a line" in printed.err
    assert "a title" in printed.out
    assert "\na line\na title\n" in text
    assert "│ reach-v3 │   0.500 │" in text
    assert "\x1b" not in text


def test_warnings_are_written_and_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    logger = logging.getLogger("softmod.somewhere")
    (tmp_path / "other").mkdir()
    both = [Transcript(tmp_path), Transcript(tmp_path / "other")]
    with both[0].of_warnings(), both[1].of_warnings():
        logger.warning("something is %s", "odd")
        logger.info("nothing is")
    logger.warning("later")
    assert capsys.readouterr().err == "something is odd\nlater\n"
    for transcript in both:
        assert transcript.path.read_text() == "something is odd\n"


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Transcript(tmp_path / "gone").line("a line")
    assert not (tmp_path / "gone").exists()
