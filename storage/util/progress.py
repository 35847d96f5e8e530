"""Progress of long work: a live bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from rich import progress as bars
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.text import Text

from gkd.storage.util.text import printable

LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1


class Advance(Protocol):
    """Adds ``amount`` to the work done, optionally with a ``note`` to show."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...  # noqa: D102


class _Bar(bars.Progress):
    """A bar with its note on the next lines: a terminal has no room for it beside the bar.

    What two spaces separate in the note stays on one line.
    """

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                parts = task.fields["note"].split("  ")
                yield Columns([Text(part, no_wrap=True) for part in parts], padding=(0, 1))


class _RateColumn(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.0f} {task.fields['unit']}/s")


@contextmanager
def progress(
    what: str, total: int, unit: str, done: int = 0, *, quiet_below: int = 0
) -> Iterator[Advance]:
    """Show the progress of ``total`` units of work on stderr, ``done`` of them done before.

    On a terminal a live bar with rate and time left; elsewhere a plain line every
    ``LINE_SECONDS`` and one at the end. Yields a function that adds to the work done, cheap enough
    to be called for each unit. Nothing is shown if ``total`` is less than ``quiet_below``.
    """
    if total < quiet_below:
        yield lambda amount=1, note="": None
        return
    began = last = time.monotonic()
    count, latest = done, ""

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal count, last, latest
        count += amount
        latest = note or latest
        now = time.monotonic()
        if now - last >= interval:
            last = now
            show(now - began)

    def show_bar(_seconds: float) -> None:
        bar.update(task, completed=count, note=printable(latest))

    def print_line(seconds: float) -> None:
        rate = (count - done) / max(seconds, 1e-9)
        ending = f" in {seconds:,.1f} s"
        if count < total:  # how long is left is unknown until something was done
            ending = f", {(total - count) / rate:,.0f} s left" if rate else ""
        text = f"{what}: {count:,}/{total:,} ({rate:,.1f} {unit}/s{ending})"
        print(printable(f"{text} {latest}".rstrip()), file=sys.stderr, flush=True)

    show: Callable[[float], None] = print_line
    interval = LINE_SECONDS
    display: bars.Progress | nullcontext[None] = nullcontext()
    if sys.stderr.isatty():
        show, interval = show_bar, _BAR_SECONDS
        columns = (bars.BarColumn(), bars.MofNCompleteColumn(), _RateColumn())
        title = bars.TextColumn("{task.description}", markup=False)
        times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
        display = bar = _Bar(title, *columns, *times, console=Console(stderr=True))
        task = bar.add_task(printable(what), total=total, completed=done, note="", unit=unit)
    with display:
        yield advance
        show(time.monotonic() - began)
