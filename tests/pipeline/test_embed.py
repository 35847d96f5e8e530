"""Batches that an accelerator is given ahead of the one that is waited for."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.pipeline.embed import embed, split_rows
from gkd.pipeline.teacher.embedder import IN_FLIGHT, Embeddings
from gkd.storage.cache.spec import VIEWS, View
from gkd.storage.records.open import open_records
from tests.pipeline.faces import PixelEmbedder, write_folder


class FarEmbedder(PixelEmbedder):
    """Computes at once when it is started; ``events`` records the order of calls."""

    device = "far"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def start(
        self, images: npt.NDArray[np.uint8], views: Sequence[View]
    ) -> Callable[[], Embeddings]:
        number = sum(kind == "start" for kind, _ in self.events)
        self.events.append(("start", number))
        embeddings = super().start(images, views)()

        def wait() -> Embeddings:
            self.events.append(("wait", number))
            return embeddings

        return wait


def test_an_accelerator_works_ahead_and_batches_keep_their_order(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "faces")
    for broken in (0, 4, 5, 6, 7):  # one of the first batch, all of the second
        (folder / f"id{broken // 5}" / f"{broken % 5}.png").write_bytes(b"no image")
    records = open_records(folder)
    there, batches = FarEmbedder(), split_rows(range(len(records)), 4)
    found = list(embed(records, batches, there, VIEWS, workers=2, skip_corrupt=True))

    assert [batch.rows for batch in found] == batches
    for batch in found:
        rows = [row for row in batch.rows if row not in (0, 4, 5, 6, 7)]
        np.testing.assert_array_equal(batch.kept + batch.rows.start, rows)
        for view in VIEWS:
            assert batch.embeddings[view].shape == (len(rows), there.embedding_dim)
            for row, embedding in zip(rows, batch.embeddings[view], strict=True):
                image = records.image(row)[:, :: -1 if view == "flipped" else 1]
                np.testing.assert_array_equal(embedding, PixelEmbedder()(image[None])[0])

    computed = len(batches) - 1  # nothing is computed for a batch without images
    waited = [at for at, (kind, _) in enumerate(there.events) if kind == "wait"]
    assert [there.events[at][1] for at in waited] == list(range(computed))
    begun = [sum(kind == "start" for kind, _ in there.events[:at]) for at in waited]
    # The second batch, for which nothing is computed, counts as one of those ahead.
    assert begun[1:] == [min(number + 1 + IN_FLIGHT, computed) for number in range(1, computed)]
