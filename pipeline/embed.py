"""Records to a teacher's embeddings, batch by batch."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gkd.pipeline.teacher.embedder import FACE_SIZE, IN_FLIGHT, Embedder, Embeddings, faulty_rows
from gkd.storage.cache.spec import Sharding, View
from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError
from gkd.storage.records.base import Records
from gkd.storage.records.images import DIGEST_BYTES, digest
from gkd.storage.util.parallel import ordered_map

# The interpreter feeds an accelerator, and its time depends on operations and not on images.
CPU_BATCH, ACCELERATOR_BATCH = 128, 1024
# More threads decode no faster: they and the one that feeds the accelerator compete for the
# interpreter's lock.
ACCELERATOR_DECODERS = 4


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of records, n of them, of which m have an image that could be read.

    rows     rows of the records
    kept     int64 [m]  positions in ``rows`` of those that have an image
    digests  uint8 [n, 16]  of the encoded images, zeros where skipped
    skipped  position in ``rows`` -> why there is no image, without file and key
    """

    rows: range
    kept: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


@dataclass(frozen=True)
class DecodedBatch(RowBatch):
    """A batch with ``images`` RGB uint8 [m, 112, 112, 3]."""

    images: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EmbeddedBatch(RowBatch):
    """A batch with ``embeddings`` float32 [m, D] in each view, of any length."""

    embeddings: Embeddings


Batch = TypeVar("Batch", bound=RowBatch)


def check_labels(records: Records) -> None:
    """Check that there are images, and that their labels are classes.

    Raises:
        ConfigError: if there are none, none can be read, or a label is beyond the classes.
    """
    if not len(records):
        raise ConfigError(path=records.path, expected="images", got="none")
    highest = int(records.labels.max())
    if highest < 0:
        raise ConfigError(
            f"none of {len(records):,} records could be read",
            path=records.path,
            remedy="`gkd records verify` lists what is wrong with each",
        )
    if highest >= records.num_classes:
        raise ConfigError(
            f"labels go up to {highest:,}, but there are {records.num_classes:,} identities",
            path=records.path,
            remedy="check the first line of `property`",
        )


def default_batch_size(embedder: Embedder) -> int:
    """Images per batch that suit the teacher's device."""
    return CPU_BATCH if embedder.device == "cpu" else ACCELERATOR_BATCH


def split_rows(rows: range, size: int) -> list[range]:
    """Consecutive rows split from the start into batches of ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def embed_shards(
    records: Records,
    shards: Iterable[int],
    sharding: Sharding,
    embedder: Embedder,
    views: Sequence[View],
    *,
    batch_size: int | None,
    workers: int,
    skip_corrupt: bool,
) -> Generator[EmbeddedBatch, None, None]:
    """``embed`` all rows of some shards, in batches from the start of each shard."""
    size = batch_size or default_batch_size(embedder)
    spans = [rows for shard in shards for rows in split_rows(sharding.rows(shard), size)]
    return embed(records, spans, embedder, views, workers=workers, skip_corrupt=skip_corrupt)


def embed(
    records: Records,
    batches: Iterable[range],
    embedder: Embedder,
    views: Sequence[View],
    *,
    workers: int,
    skip_corrupt: bool,
) -> Generator[EmbeddedBatch, None, None]:
    """Embeddings of batches of rows, in their order, decoded ahead by ``workers`` threads.

    An accelerator runs ahead of the consumer as well, by ``IN_FLIGHT`` batches. All queues are
    bounded, so a slow consumer slows the decoding down.

    Raises:
        CorruptRecordError: at the first unreadable record, unless ``skip_corrupt``.
        GkdError: if the teacher's output has no direction, naming the record.
    """
    ahead = 0
    if embedder.device != "cpu":
        ahead, workers = IN_FLIGHT, min(workers, ACCELERATOR_DECODERS)
    nothing: Embeddings = {
        view: np.empty((0, embedder.embedding_dim), np.float32) for view in views
    }
    started: deque[tuple[DecodedBatch, Callable[[], Embeddings]]] = deque()
    decode = partial(_decode, records, skip_corrupt)
    with closing(ordered_map(decode, batches, workers=workers)) as decoded:
        for batch in decoded:
            wait = embedder.start(batch.images, views) if len(batch.kept) else lambda: nothing
            started.append((batch, wait))
            if len(started) > ahead:
                yield _finish(records, embedder, *started.popleft())
        for batch, wait in started:
            yield _finish(records, embedder, batch, wait)


def _decode(records: Records, skip_corrupt: bool, rows: range) -> DecodedBatch:
    images = np.empty((len(rows), FACE_SIZE, FACE_SIZE, 3), np.uint8)
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    skipped: dict[int, str] = {}
    for position, row in enumerate(rows):
        try:
            encoded, images[position] = records.face(row)
        except CorruptRecordError as error:
            if not skip_corrupt:
                raise CorruptRecordError(
                    error.problem,
                    path=error.path,
                    remedy="`gkd records verify` lists all such records, and --skip-corrupt leaves "
                    "them out",
                ) from error
            # Without the path: the cache's bytes must not depend on the folder of the records.
            skipped[position] = error.problem
        else:
            digests[position] = np.frombuffer(digest(encoded), np.uint8)
    kept = np.setdiff1d(np.arange(len(rows)), list(skipped))
    return DecodedBatch(rows, kept, digests, skipped, images[kept] if skipped else images)


def _finish(
    records: Records, embedder: Embedder, batch: DecodedBatch, wait: Callable[[], Embeddings]
) -> EmbeddedBatch:
    embeddings = wait()
    for view, of_view in embeddings.items():
        faulty = faulty_rows(of_view)
        if len(faulty):
            first = batch.rows[batch.kept[faulty[0]]]
            raise GkdError(
                f"{embedder.name}: NaN, infinite or zero embeddings of {len(faulty)} of "
                f"{len(of_view)} images ({view} view), the first of {records.where(first)}; "
                f"computed in {embedder.precision}: try --precision float32, and check the weights "
                "and the preprocessing"
            )
    return EmbeddedBatch(batch.rows, batch.kept, batch.digests, batch.skipped, embeddings)


def whole_shards(
    batches: Iterable[Batch], sharding: Sharding, advance: Callable[[int], object]
) -> Iterator[list[Batch]]:
    """Consecutive batches, collected by shard; ``advance`` is called with the rows of each."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        advance(len(batch.rows))
        shard = sharding.shard_of(batch.rows.start)
        if batch.rows.stop == sharding.rows(shard).stop:
            yield parts
            parts = []


def join_rows(batches: Sequence[RowBatch]) -> RowBatch:
    """The rows of consecutive batches as one batch."""
    start = batches[0].rows.start
    return RowBatch(
        range(start, batches[-1].rows.stop),
        np.concatenate([batch.kept + (batch.rows.start - start) for batch in batches]),
        np.concatenate([batch.digests for batch in batches]),
        {
            position + batch.rows.start - start: reason
            for batch in batches
            for position, reason in batch.skipped.items()
        },
    )


def join_batches(batches: Sequence[EmbeddedBatch]) -> EmbeddedBatch:
    """Consecutive batches as one."""
    embeddings: Embeddings = {
        view: np.concatenate([batch.embeddings[view] for batch in batches])
        for view in batches[0].embeddings
    }
    return EmbeddedBatch(**vars(join_rows(batches)), embeddings=embeddings)


def split_batch(batch: EmbeddedBatch, size: int) -> Iterator[EmbeddedBatch]:
    """The reverse of ``join_batches``: batches of ``size`` rows from the start."""
    for rows in split_rows(batch.rows, size):
        start, stop = rows.start - batch.rows.start, rows.stop - batch.rows.start
        first, last = np.searchsorted(batch.kept, [start, stop])
        yield EmbeddedBatch(
            rows=rows,
            kept=batch.kept[first:last] - start,
            digests=batch.digests[start:stop],
            skipped={p - start: r for p, r in batch.skipped.items() if start <= p < stop},
            embeddings={view: e[first:last] for view, e in batch.embeddings.items()},
        )
