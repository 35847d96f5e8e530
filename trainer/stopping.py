"""Signals that ask a training to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """The signal that asked this rank to end, and whether all ranks know that one was asked."""

    received: str = ""
    agreed: bool = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let SIGTERM and SIGINT end the training at a step's end; a second one is not waited for."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.received = signal.Signals(number).name
        signal.signal(number, previous[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {int(number): signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
