"""Records to a teacher's embeddings batch by batch, and a folder that keeps these."""

import io
import shutil
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.teacher import FACE_SIZE, Embedder, faulty_rows
from gkd.storage import atomic
from gkd.storage.disk import disk_errors
from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError, SpecMismatchError
from gkd.storage.images import DIGEST_BYTES, decode_face, digest
from gkd.storage.parallel import ordered_map
from gkd.storage.rows import Records
from gkd.storage.spec import DatasetSpec, Preprocess, TeacherSpec, View

SETTINGS = "settings.json"
IN_FLIGHT = 2  # batches on an accelerator: one is copied to or from it while the other is computed
SAMPLED_SHARDS, SAMPLED_IMAGES = 4, 512


@dataclass(frozen=True)
class EmbeddedBatch:
    """Embeddings of consecutive rows, n of them, m with an image that could be read.

    rows        rows of the records
    kept        int64 [m]  places within ``rows`` of those that have embeddings
    embeddings  view -> float32 [m, D], of any length
    digests     uint8 [n, 16]  of the encoded images, zeros where skipped
    skipped     place within ``rows`` -> why it has no embedding, without file and key
    """

    rows: range
    kept: npt.NDArray[np.int64]
    embeddings: Mapping[View, npt.NDArray[np.float32]]
    digests: npt.NDArray[np.uint8]
    skipped: Mapping[int, str]


def cut(rows: range, size: int) -> list[range]:
    """Consecutive rows cut from the start into batches of ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


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

    A teacher on a device of its own runs ahead of the consumer as well, in threads that keep
    ``IN_FLIGHT`` batches there. All queues are bounded: whoever takes slowly slows the decoding
    down.

    Raises:
        CorruptRecordError: at the first unreadable record, unless ``skip_corrupt``.
        GkdError: where the teacher's output has no direction, naming the record.
    """

    def decode_batch(rows: range) -> _Decoded:
        return _decode(records, rows, skip_corrupt)

    def embed_batch(batch: _Decoded) -> EmbeddedBatch:
        return _embed_decoded(records, batch, embedder, views)

    with closing(ordered_map(decode_batch, batches, workers=workers)) as decoded:
        if embedder.device == "cpu":
            # The consumer computes on the same cores, and changes how many threads torch has.
            yield from map(embed_batch, decoded)
        else:
            with closing(ordered_map(embed_batch, decoded, workers=IN_FLIGHT)) as embedded:
                yield from embedded


@dataclass(frozen=True)
class _Decoded:
    rows: range
    kept: npt.NDArray[np.int64]
    images: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]
    skipped: dict[int, str]


def _decode(records: Records, rows: range, skip_corrupt: bool) -> _Decoded:
    images = np.empty((len(rows), FACE_SIZE, FACE_SIZE, 3), np.uint8)
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    skipped: dict[int, str] = {}
    for place, row in enumerate(rows):
        try:
            encoded = records.encoded(row)
            images[place] = decode_face(encoded, records.where(row))
        except CorruptRecordError as error:
            if not skip_corrupt:
                raise CorruptRecordError(
                    f"{error}; `gkd records verify` lists all such records, and --skip-corrupt "
                    "leaves them out"
                ) from error
            # Without the place: the cache's bytes must not follow the folder of the records.
            skipped[place] = str(error).removeprefix(f"{records.where(row)}: ")
        else:
            digests[place] = np.frombuffer(digest(encoded), np.uint8)
    kept = np.setdiff1d(np.arange(len(rows)), list(skipped))
    return _Decoded(rows, kept, images[kept] if skipped else images, digests, skipped)


def _embed_decoded(
    records: Records, batch: _Decoded, embedder: Embedder, views: Sequence[View]
) -> EmbeddedBatch:
    embeddings: dict[View, npt.NDArray[np.float32]] = {}
    for view in views:
        if not len(batch.kept):
            embeddings[view] = np.empty((0, embedder.embedding_dim), np.float32)
            continue
        images = batch.images if view == "original" else batch.images[:, :, ::-1]
        embeddings[view] = embedder(images)
        faulty = faulty_rows(embeddings[view])
        if len(faulty):
            first = batch.rows[batch.kept[faulty[0]]]
            raise GkdError(
                f"{embedder.name}: NaN, infinite or zero embeddings of {len(faulty)} of "
                f"{len(images)} images ({view} view), the first of {records.where(first)}; "
                f"computed in {embedder.precision}: try --precision float32, and check the weights "
                "and the preprocessing"
            )
    return EmbeddedBatch(batch.rows, batch.kept, embeddings, batch.digests, batch.skipped)


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
        skipped={
            place + b.rows.start - start: reason
            for b in batches
            for place, reason in b.skipped.items()
        },
    )


def split_batch(batch: EmbeddedBatch, size: int) -> Iterator[EmbeddedBatch]:
    """The reverse of ``join_batches``: batches of ``size`` rows from the start."""
    for rows in cut(batch.rows, size):
        start, stop = rows.start - batch.rows.start, rows.stop - batch.rows.start
        first, last = np.searchsorted(batch.kept, [start, stop])
        yield EmbeddedBatch(
            rows=rows,
            kept=batch.kept[first:last] - start,
            embeddings={view: e[first:last] for view, e in batch.embeddings.items()},
            digests=batch.digests[start:stop],
            skipped={p - start: r for p, r in batch.skipped.items() if start <= p < stop},
        )


class EmbeddingSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides kept embeddings."""

    teacher: TeacherSpec
    preprocess: Preprocess
    precision: str
    dataset: DatasetSpec
    shard_samples: int


class EmbeddingStore:
    """Embeddings of shards kept in a folder, each file whole or absent.

    Raises:
        SpecMismatchError: where the folder holds those of another teacher or data set.
    """

    def __init__(self, folder: Path, source: EmbeddingSource, *, skip_corrupt: bool) -> None:
        self.folder, self.skip_corrupt = folder, skip_corrupt
        settings = folder / SETTINGS
        if not settings.exists():
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                atomic.write_file(settings, msgspec.json.format(msgspec.json.encode(source)))
        _require_same(settings, source)

    def has(self, shard: int) -> bool:
        """Whether the shard's embeddings are kept."""
        return self._path(shard).exists()

    def shards(self) -> list[int]:
        """The shards that are kept, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def sample(self, view: View) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows [n] of the records and their embeddings [n, D]: a random few of a few shards."""
        kept, rng = self.shards(), np.random.default_rng(0)
        places = np.linspace(0, len(kept) - 1, min(len(kept), SAMPLED_SHARDS)).astype(int)
        rows, embeddings = [], []
        for place in places.tolist():
            batch = self.load(kept[place], [view])
            count = min(SAMPLED_IMAGES // len(places), len(batch.kept))
            some = np.sort(rng.choice(len(batch.kept), count, replace=False))
            rows.append(batch.rows.start + batch.kept[some])
            embeddings.append(batch.embeddings[view][some])
        return np.concatenate(rows), np.concatenate(embeddings)

    def save(self, shard: int, batch: EmbeddedBatch) -> None:
        """Keep the embeddings of a whole shard."""
        buffer = io.BytesIO()
        arrays = {f"embeddings_{view}": e for view, e in batch.embeddings.items()}
        skipped = np.frombuffer(msgspec.json.encode(dict(batch.skipped)), np.uint8)
        np.savez(
            buffer,
            allow_pickle=False,
            rows=np.array([batch.rows.start, batch.rows.stop]),
            kept=batch.kept,
            digests=batch.digests,
            skipped=skipped,
            **arrays,
        )
        with disk_errors(self.folder):
            atomic.write_file(self._path(shard), buffer.getvalue())

    def load(self, shard: int, views: Sequence[View]) -> EmbeddedBatch:
        """The kept embeddings of a shard.

        Raises:
            CorruptRecordError: where an earlier run left records out and this one shall not.
        """
        with np.load(self._path(shard), allow_pickle=False) as arrays:
            start, stop = arrays["rows"].tolist()
            batch = EmbeddedBatch(
                rows=range(start, stop),
                kept=arrays["kept"],
                embeddings={view: arrays[f"embeddings_{view}"] for view in views},
                digests=arrays["digests"],
                skipped=msgspec.json.decode(arrays["skipped"].tobytes(), type=dict[int, str]),
            )
        if batch.skipped and not self.skip_corrupt:
            place, reason = next(iter(batch.skipped.items()))
            raise CorruptRecordError(
                f"{self._path(shard)}: row {start + place} of the records: {reason}; an earlier "
                "run left it out by --skip-corrupt: give that again to go on"
            )
        return batch

    def remove(self) -> None:
        """Delete the folder."""
        # Renamed first: what an interruption leaves is no folder of embeddings without settings.
        aside = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
        self.folder.rename(aside)
        shutil.rmtree(aside)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npz"


def _require_same(path: Path, source: EmbeddingSource) -> None:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=EmbeddingSource)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: expected the settings of kept embeddings, got {error}; delete "
            f"{path.parent} to start again"
        ) from error
    differing = [
        f"  {name}: kept {getattr(kept, name)}, this run {getattr(source, name)}"
        for name in EmbeddingSource.__struct_fields__
        if getattr(kept, name) != getattr(source, name)
    ]
    if differing:
        raise SpecMismatchError(
            f"{path.parent} keeps embeddings of another run:\n"
            + "\n".join(differing)
            + f"\nRun again as before to go on, or delete {path.parent} to start again."
        )
