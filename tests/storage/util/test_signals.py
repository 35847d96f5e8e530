"""Signals that end a training."""

import os
import pty
import signal
import time
from pathlib import Path

import pytest

from gkd.storage.util.signals import STOP_SIGNALS, stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_is_heard_and_then_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        signal.raise_signal(number)
        assert stop.received == number.name
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_words_to_a_terminal_that_closed_are_no_error(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if not child:  # a leader of a session of its own, on a terminal of its own
        try:
            with stop_signals() as stop:
                os.write(1, b"ready")
                while not stop.received:
                    time.sleep(0.01)
                os.write(2, b"a checkpoint is being written")
                (tmp_path / "received").write_text(stop.received)
        finally:
            os._exit(0)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    os.waitpid(child, 0)
    assert (tmp_path / "received").read_text() == "SIGHUP"
