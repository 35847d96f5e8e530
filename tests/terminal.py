"""A terminal for code under test."""

import os
import pty
import re
import struct
import termios
from collections.abc import Callable
from fcntl import ioctl
from typing import Any

from tests.processes import running


def on_a_terminal(columns: int, function: Callable[..., object], *arguments: Any) -> str:
    """What a function shows on a terminal of that width, without its control sequences."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    with running(_on, os.ttyname(theirs), function, arguments, env={"TERM": "xterm"}) as process:
        assert os.read(ours, 1) == b".", process.err  # the process has opened it
        os.close(theirs)
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other side is closed
            pass
        os.close(ours)
        assert process.wait(timeout=60) == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def _on(name: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.pop("COLUMNS", None)
    terminal = os.open(name, os.O_RDWR)
    os.write(terminal, b".")
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    function(*arguments)
