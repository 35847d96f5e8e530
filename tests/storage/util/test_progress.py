"""Progress on a terminal of any width, and in a log."""

import re
import time

import pytest

from gkd.storage.util.progress import progress
from tests.terminal import on_a_terminal

NOTE = "loss 97.759  ce 30.930  primary 3.1966  binary 3.7646  lr 0.095  data wait 11%"


def work() -> None:
    with progress("epoch 1/20", 400, "images") as advance:
        for step in range(10):
            time.sleep(0.03)
            advance(40, NOTE if step == 4 else "")


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_the_bar_and_the_full_note(columns: int) -> None:
    shown = on_a_terminal(columns, work)
    assert re.search(r"epoch 1/20 .*400/400 [\d,]+ images/s 0:00:\d\d 0:00:00", shown)
    assert re.search(r"images/s 0:00:\d\d 0:00:0\d", shown)  # time left
    # A note stays until the next or the end; a narrow terminal breaks it at a space.
    end = shown[shown.rindex("400/400") :]
    assert NOTE.split() == end.split()[-len(NOTE.split()) :]
    assert "…" not in shown


def test_a_log_gets_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    work()
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"epoch 1/20: 400/400 \([\d,.]+ images/s in [\d.]+ s\) {re.escape(NOTE)}", line
    )


def odd_names() -> None:
    with progress("[red]a\x1b]0;b\x07", 2, "images") as advance:
        advance(2, "[/] of\x1b[2J")


def test_names_of_others_are_shown_as_text(capfd: pytest.CaptureFixture[str]) -> None:
    shown = on_a_terminal(200, odd_names)
    assert "[red]a\ufffd]0;b\ufffd " in shown
    assert "[/] of\ufffd[2J" in shown
    odd_names()
    line = capfd.readouterr().err
    assert line.startswith("[red]a\ufffd]0;b\ufffd: 2/2 ")
    assert line.endswith(" [/] of\ufffd[2J\n")
