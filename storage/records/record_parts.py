"""Several record packs as one data set, as WebFace42M comes in ten."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gkd.storage.records.base import Layout, Records
from gkd.storage.records.pack import RecordFile


class RecordParts(Records):
    """The images of the packs ``paths`` of one folder, one pack after the other.

    The packs share one numbering of the identities, and the ``property`` file beside them. A key is
    the pack's name, a slash and the key there.

    Raises:
        ConfigError: where a pack has no image, or ``property`` cannot be read.
        CorruptRecordError: where an index cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts = tuple(RecordFile(path) for path in paths)
        self.path = self.parts[0].path.parent
        self.name = self.path.name
        self.label_order = self.parts[0].label_order
        layouts: set[Layout] = {part.layout for part in self.parts}
        self.layout = layouts.pop() if len(layouts) == 1 else "mixed"
        self.indexed = all(part.indexed for part in self.parts)
        self.num_classes = max(part.num_classes for part in self.parts)
        self.labels = np.concatenate([part.labels for part in self.parts])
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def key(self, row: int) -> str:
        """The pack's name and the record's key there: ``webface_03/17``."""
        part, inside = self._place(row)
        return f"{part.path.stem}/{part.key(inside)}"

    def where(self, row: int) -> str:
        """File, key and offset in words."""
        part, inside = self._place(row)
        return part.where(inside)

    def encoded(self, row: int) -> memoryview:
        """The encoded image, a view of the memory map where the record is one part.

        Raises:
            CorruptRecordError: naming file, key and offset, what was expected and what was got.
        """
        part, inside = self._place(row)
        return part.encoded(inside)

    def stamps(self) -> Iterator[tuple[str, os.stat_result]]:
        """Names of all packs and indices, and what the system says now of each."""
        for part in self.parts:
            yield from part.stamps()

    def _place(self, row: int) -> tuple[RecordFile, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        part = self.parts[number]
        return part, row - int(self._ends[number]) + len(part)
