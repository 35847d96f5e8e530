"""Signals that request the end of a training."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ECHO_SECONDS = 1.0
# Ctrl-C and kill; a terminal that closes; what schedulers send before a job's time is up.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Stop:
    """The signal that this rank received, and whether all ranks know that one did."""

    received: str = ""
    agreed: bool = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let ``STOP_SIGNALS`` end the training after a step; a second one ends it at once.

    A scheduler signals every process, and torchrun signals its ranks again: a repetition within
    ``ECHO_SECONDS`` is no second signal. A signal that was ignored before, as ``nohup`` ignores
    SIGHUP, stays so.
    """
    stop, first = Stop(), math.inf
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if number == signal.SIGHUP:
            for terminal in terminals:  # it closes: a word to it would be an error
                os.dup2(nowhere, terminal)
        if not stop.received:
            first = now
            stop.received = signal.Signals(number).name
        elif now - first > ECHO_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(signal.Signals(number))

    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {int(number): signal.signal(number, handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(nowhere)
