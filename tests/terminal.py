"""A terminal for programs under test."""

import os
import pty
import re
import struct
import subprocess
import termios
from fcntl import ioctl

from tests.paths import ROOT


def on_a_terminal(command: list[str], columns: int) -> str:
    """What a program shows on a terminal so wide, without its control sequences."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other side is closed
            pass
        os.close(ours)
        assert process.wait(timeout=60) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
