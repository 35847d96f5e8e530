"""Random images of the records and their embeddings, for checks and forecasts."""

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from gkd.pipeline.embed import EmbeddedBatch, embed, join_batches, split_rows
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import View
from gkd.storage.records.base import Records, Subset

SEED = 0


def random_rows(records: Records, count: int) -> npt.NDArray[np.int64]:
    """Rows of ``count`` random images with a label, ascending; of all if there are fewer."""
    labelled = np.flatnonzero(records.labels >= 0)
    rng = np.random.default_rng(SEED)
    return np.sort(rng.choice(labelled, min(count, len(labelled)), replace=False))


def embed_rows(
    records: Records,
    rows: npt.NDArray[np.int64],
    embedder: Embedder,
    views: Sequence[View],
    *,
    batch_size: int,
    workers: int,
    after_batch: Callable[[int], None] = lambda images: None,
) -> EmbeddedBatch:
    """Embeddings of ``rows`` [n], as one batch of n rows; unreadable images are skipped.

    ``after_batch`` is called with the number of rows of each batch.

    Raises:
        GkdError: if the teacher's output is unusable.
    """
    spans = split_rows(range(len(rows)), batch_size)
    subset = Subset(records, rows)
    batches: list[EmbeddedBatch] = []
    made = embed(subset, spans, embedder, views, workers=workers, skip_corrupt=True)
    with closing(made) as embedded:
        for batch in embedded:
            batches.append(batch)
            after_batch(len(batch.rows))
    return join_batches(batches)
