"""Signals that end any command, with a word."""

import signal

import pytest

from tests.commands.running import gkd


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_command_is_interrupted_unless_the_signal_was_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    try:
        for ignored in (False, True):
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            gkd("records", "info", "nowhere")
            assert (signal.getsignal(number) == signal.SIG_IGN) == ignored
        signal.signal(number, signal.SIG_DFL)
        gkd("records", "info", "nowhere")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
