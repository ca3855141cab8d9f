"""A Ctrl-C that Python drops is raised later."""

from __future__ import annotations

import os
import signal

import pytest

from softmod.system import signals


class Unlucky:
    """Receives an interrupt in its destructor, where exceptions are ignored."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two of these
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_ignored_is_remembered():
    before = signal.getsignal(signal.SIGINT)
    with signals.handled():
        signals.check()
        unlucky = Unlucky()
        del unlucky
        with pytest.raises(KeyboardInterrupt):
            signals.check()
    signals.check()
    assert signal.getsignal(signal.SIGINT) is before


def interrupt() -> None:
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


def test_an_interrupt_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    signals.check()
