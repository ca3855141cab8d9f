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


@pytest.mark.parametrize("number", signals.STOPS)
def test_every_signal_that_asks_a_run_to_stop_is_seen(number):
    with signals.handled():
        assert not signals.stopping()
        os.kill(os.getpid(), number)
        assert signals.stopping()
    assert not signals.stopping()


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stopping()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
