"""Terminal output that fails never ends the training."""

from __future__ import annotations

import io

import pytest

from softmod.clock import Clock
from softmod.spec import TaskScore
from softmod.tracking.console import Progress, Terminal, print_table

SCORES = [TaskScore("toy-reach", 0.5, 100.0, 4)]
FAULTS = [
    BrokenPipeError(32, "Broken pipe"),
    OSError(5, "Input/output error"),
    OSError(28, "No space left on device"),
]


class Gone(io.StringIO):
    """A stream that fails on every write."""

    def __init__(self, fault: OSError, terminal: bool = False) -> None:
        super().__init__()
        self.fault, self.terminal, self.tries = fault, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.fault


@pytest.mark.bar(7)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_is_gone_is_written_no_more(
    fault: OSError, terminal: bool, monkeypatch: pytest.MonkeyPatch
):
    stream = Gone(fault, terminal)
    with Progress(100, console=Terminal(file=stream, force_terminal=terminal)) as progress:
        progress.say("a line")
        progress.show(Clock(10), 1.0, 1.0)
        tries = stream.tries
        assert tries
        progress.evaluation(Clock(10), SCORES)
        assert stream.tries == tries
    monkeypatch.setattr("sys.stdout", Gone(fault))
    print_table(SCORES, "a title")


@pytest.mark.control(7)
def test_seen_failing_a_console_as_it_comes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Terminal, "on_broken_pipe")
    with pytest.raises(SystemExit):
        Progress(100, console=Terminal(file=Gone(FAULTS[0]))).say("a line")
