"""Results of evaluations, and their tables for people."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gkd.storage.util.text import printable

# Of a rich table: a border or separator and a blank on both sides of each column.
COLUMN_FRAME, LAST_FRAME = 3, 1


class Result(ABC):
    """What one model scores on one set; rates are fractions, not percent.

    protocol  name in JSON
    title     of the table that shows such results
    """

    protocol: ClassVar[str]
    title: ClassVar[str]
    name: str

    @abstractmethod
    def to_builtins(self) -> dict[str, Any]:
        """For JSON."""

    @abstractmethod
    def metrics(self) -> dict[str, str]:
        """Names and formatted values, for a table."""

    @property
    def warning(self) -> str:
        """What makes the result less reliable than it looks; empty if nothing does."""
        return ""


def print_results(results: Sequence[Result], console: Console) -> None:
    """Print the results, those of one protocol together."""
    for title in dict.fromkeys(result.title for result in results):
        for table in result_tables([r for r in results if r.title == title], console.width):
            console.print(table)


def result_tables(results: Sequence[Result], width: int) -> Iterator[Table]:
    """Yield tables of ``width`` characters with a row per metric and a column per set.

    As many sets share a table as fit without cutting or wrapping a word; a dash is shown for a
    metric that a set does not have.
    """
    values = [result.metrics() for result in results]
    names = list(dict.fromkeys(name for metrics in values for name in metrics))
    widths = [
        max(len(result.name), *map(len, metrics.values())) + COLUMN_FRAME
        for result, metrics in zip(results, values, strict=True)
    ]
    start = 0
    while start < len(results):
        room, stop = width - max(map(len, names)) - COLUMN_FRAME - LAST_FRAME, start
        while stop < len(results) and (stop == start or widths[stop] <= room):
            room -= widths[stop]
            stop += 1
        table = Table(title=results[start].title)
        table.add_column("set", no_wrap=True)
        for result in results[start:stop]:
            table.add_column(Text(printable(result.name)), justify="right", overflow="fold")
        for name in names:
            table.add_row(name, *(metrics.get(name, "-") for metrics in values[start:stop]))
        yield table
        start = stop
