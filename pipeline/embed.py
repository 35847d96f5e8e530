"""Records to a teacher's embeddings, batch by batch."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gkd.pipeline.teacher.embedder import FACE_SIZE, IN_FLIGHT, Embedder, Embeddings, faulty_rows
from gkd.storage.cache.spec import Sharding, View
from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError
from gkd.storage.records.base import Records
from gkd.storage.records.images import DIGEST_BYTES, decode_face, digest
from gkd.storage.util.parallel import ordered_map

# The interpreter feeds an accelerator, and its time depends on operations and not on images.
CPU_BATCH, ACCELERATOR_BATCH = 128, 1024
# More threads decode no faster: they and the one that feeds the accelerator compete for the
# interpreter's lock.
ACCELERATOR_DECODERS = 4


class RowBatch(Protocol):
    """A batch of consecutive rows; ``skipped`` is position in ``rows`` -> why it has no data."""

    @property
    def rows(self) -> range: ...  # noqa: D102

    @property
    def skipped(self) -> Mapping[int, str]: ...  # noqa: D102


Batch = TypeVar("Batch", bound=RowBatch)


@dataclass(frozen=True)
class DecodedBatch:
    """Images of consecutive rows, n of them, m that could be read.

    rows     rows of the records
    kept     int64 [m]  positions in ``rows`` of those that have an image
    images   uint8 [m, 112, 112, 3], RGB
    digests  uint8 [n, 16]  of the encoded images, zeros where skipped
    skipped  position in ``rows`` -> why there is no image, without file and key
    """

    rows: range
    kept: npt.NDArray[np.int64]
    images: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


@dataclass(frozen=True)
class EmbeddedBatch:
    """A ``DecodedBatch`` with embeddings in place of images: view -> float32 [m, D], any length."""

    rows: range
    kept: npt.NDArray[np.int64]
    embeddings: Mapping[View, npt.NDArray[np.float32]]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


def check_labels(records: Records) -> None:
    """Check that there are images, and that their labels are classes.

    Raises:
        ConfigError: if there are none, none can be read, or a label is beyond the classes.
    """
    if not len(records):
        raise ConfigError(f"{records.path}: expected images, got none")
    highest = int(records.labels.max())
    if highest < 0:
        raise ConfigError(
            f"{records.path}: none of {len(records):,} records could be read; `gkd records verify` "
            "lists what is wrong with each"
        )
    if highest >= records.num_classes:
        raise ConfigError(
            f"{records.path}: labels go up to {highest:,}, but there are {records.num_classes:,} "
            "identities; check the first line of `property`"
        )


def default_batch_size(embedder: Embedder) -> int:
    """Images per batch that suit the teacher's device."""
    return CPU_BATCH if embedder.device == "cpu" else ACCELERATOR_BATCH


def split_rows(rows: range, size: int) -> list[range]:
    """Consecutive rows split from the start into batches of ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


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
    decode_batch = partial(_decode, records, skip_corrupt)
    ahead = 0
    if embedder.device != "cpu":
        ahead, workers = IN_FLIGHT, min(workers, ACCELERATOR_DECODERS)
    started: deque[tuple[DecodedBatch, Callable[[], Embeddings]]] = deque()
    with closing(ordered_map(decode_batch, batches, workers=workers)) as decoded:
        for batch in decoded:
            started.append((batch, _start(batch, embedder, views)))
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
            encoded = records.encoded(row)
            images[position] = decode_face(encoded, records.where(row))
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
    return DecodedBatch(rows, kept, images[kept] if skipped else images, digests, skipped)


def _start(
    batch: DecodedBatch, embedder: Embedder, views: Sequence[View]
) -> Callable[[], Embeddings]:
    if not len(batch.kept):
        return lambda: {view: np.empty((0, embedder.embedding_dim), np.float32) for view in views}
    return embedder.start(batch.images, views)


def _finish(
    records: Records, embedder: Embedder, batch: DecodedBatch, wait: Callable[[], Embeddings]
) -> EmbeddedBatch:
    found = wait()
    for view, embeddings in found.items():
        faulty = faulty_rows(embeddings)
        if len(faulty):
            first = batch.rows[batch.kept[faulty[0]]]
            raise GkdError(
                f"{embedder.name}: NaN, infinite or zero embeddings of {len(faulty)} of "
                f"{len(embeddings)} images ({view} view), the first of {records.where(first)}; "
                f"computed in {embedder.precision}: try --precision float32, and check the weights "
                "and the preprocessing"
            )
    return EmbeddedBatch(batch.rows, batch.kept, found, batch.digests, batch.skipped)


def join_batches(batches: Sequence[EmbeddedBatch]) -> EmbeddedBatch:
    """Consecutive batches as one."""
    start = batches[0].rows.start
    return EmbeddedBatch(
        rows=range(start, batches[-1].rows.stop),
        kept=np.concatenate([b.kept + (b.rows.start - start) for b in batches]),
        embeddings={
            view: np.concatenate([b.embeddings[view] for b in batches])
            for view in batches[0].embeddings
        },
        digests=np.concatenate([b.digests for b in batches]),
        skipped=join_skipped(batches),
    )


def join_skipped(batches: Sequence[RowBatch]) -> dict[int, str]:
    """``skipped`` of consecutive batches as one."""
    start = batches[0].rows.start
    return {
        position + batch.rows.start - start: reason
        for batch in batches
        for position, reason in batch.skipped.items()
    }


def split_batch(batch: EmbeddedBatch, size: int) -> Iterator[EmbeddedBatch]:
    """The reverse of ``join_batches``: batches of ``size`` rows from the start."""
    for rows in split_rows(batch.rows, size):
        start, stop = rows.start - batch.rows.start, rows.stop - batch.rows.start
        first, last = np.searchsorted(batch.kept, [start, stop])
        yield EmbeddedBatch(
            rows=rows,
            kept=batch.kept[first:last] - start,
            embeddings={view: e[first:last] for view, e in batch.embeddings.items()},
            digests=batch.digests[start:stop],
            skipped={p - start: r for p, r in batch.skipped.items() if start <= p < stop},
        )
