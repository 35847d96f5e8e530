"""Signals that ask a training to end."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ECHO_SECONDS = 1.0


@dataclass
class Stop:
    """The signal that asked this rank to end, and whether all ranks know that one was asked."""

    received: str = ""
    agreed: bool = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let SIGTERM and SIGINT end the training at a step's end; a repeated one ends it at once.

    A scheduler signals every process, and torchrun its ranks once more: what comes within
    ``ECHO_SECONDS`` is no other signal.
    """
    stop, first = Stop(), math.inf
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if not stop.received:
            first = now
            stop.received = signal.Signals(number).name
        elif now - first > ECHO_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(signal.Signals(number))

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {int(number): signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
