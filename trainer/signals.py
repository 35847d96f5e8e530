"""Signals that request the end of a training."""

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
    """The signal that this rank received, and whether all ranks know that one did."""

    received: str = ""
    agreed: bool = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let SIGTERM and SIGINT end the training after a step; a second one ends it at once.

    A scheduler signals every process, and torchrun signals its ranks again: a repetition within
    ``ECHO_SECONDS`` is no second signal.
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

    numbers = (int(signal.SIGTERM), int(signal.SIGINT))
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
