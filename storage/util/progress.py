"""Progress of long work: a live bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SECONDS = 10.0


class Advance(Protocol):
    """Adds ``amount`` to the work done, optionally with a ``note`` to show."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...  # noqa: D102


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.0f} {self.unit}/s")


class _NotedProgress(Progress):
    """A bar with its note on the next line: a terminal has no room for it beside the bar."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}")


@contextmanager
def progress(
    what: str, total: int, unit: str, done: int = 0, *, quiet_below: int = 0
) -> Iterator[Advance]:
    """Show the progress of ``total`` units of work on stderr, ``done`` of them done before.

    On a terminal a live bar with rate and time left; elsewhere a plain line every
    ``LINE_SECONDS`` and one at the end. Yields a function that adds to the work done. Nothing is
    shown if ``total`` is less than ``quiet_below``: the work is done at once.
    """
    if total < quiet_below:
        yield lambda amount=1, note="": None
        return
    if sys.stderr.isatty():
        bar = _NotedProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance_bar(amount: int = 1, note: str = "") -> None:
                if note:
                    bar.update(task, note=note)
                bar.update(task, advance=amount)

            yield advance_bar
        return

    began = last = time.monotonic()
    count = done
    latest = ""

    def line(now: float) -> None:
        rate = (count - done) / max(now - began, 1e-9)
        ending = f" in {now - began:,.1f} s"
        if count < total:  # how long is left is unknown until something was done
            ending = f", {(total - count) / rate:,.0f} s left" if rate else ""
        text = f"{what}: {count:,}/{total:,} ({rate:,.1f} {unit}/s{ending})"
        print(f"{text} {latest}".rstrip(), file=sys.stderr, flush=True)

    def advance_line(amount: int = 1, note: str = "") -> None:
        nonlocal count, last, latest
        count += amount
        latest = note or latest
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            line(now)

    yield advance_line
    line(time.monotonic())
