"""The first stage: records and a teacher in, a cache of its primary groups out."""

import io
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from gkd.pipeline.cache_spec import cache_spec, dataset_spec
from gkd.pipeline.centers.files import read_npy
from gkd.pipeline.centers.load import (
    CLASS_MEAN,
    Centers,
    max_cosine_error,
    on_device,
)
from gkd.pipeline.centers.means import centers_path, class_means, require_all_classes
from gkd.pipeline.checks.calibration import check_preprocessing, report_group_sizes, sample_images
from gkd.pipeline.embed import (
    EmbeddedBatch,
    check_labels,
    cut,
    embed,
    images_a_batch,
    split_batch,
)
from gkd.pipeline.embedding_store import EmbeddingStore, work_path
from gkd.pipeline.resume_check import Seen, require_same_images
from gkd.pipeline.settings import CacheSettings
from gkd.pipeline.shard_writer import (
    AsyncShardWriter,
    PartitionedBatch,
    partition_batch,
    write_shard_job,
)
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache import layout
from gkd.storage.cache.card import write_card
from gkd.storage.cache.metadata import committed_shards, read_spec
from gkd.storage.cache.reader import Cache, digests_of
from gkd.storage.cache.spec import VIEWS, CacheSpec, CentersSpec, View
from gkd.storage.cache.writer import CacheWriter, delete_leftovers, require_writable
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util import torchrun_env
from gkd.storage.util.files import disk_errors, require_room, write_file
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.progress import Advance, progress

SAMPLE_BYTES = 100  # of a view: a rough floor for the disk that a cache needs


@dataclass(frozen=True)
class CacheSummary:
    """What a finished cache holds, and what this process did for it.

    ``entries``, ``mean_group`` and ``truncated`` are by view; ``bytes`` are the whole cache's;
    ``images`` went through the teacher in this run, in ``seconds`` with all else.
    """

    cache_id: str
    samples: int
    skipped: int
    entries: Mapping[View, int]
    mean_group: Mapping[View, float]
    truncated: Mapping[View, int]
    bytes: int
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images of this run, each in all its views, a second."""
        return self.images / self.seconds


def cache_teacher(
    records: Records,
    out: Path,
    embedder: Embedder,
    centers: Centers | Literal["class-mean"],
    settings: CacheSettings,
    *,
    rank: int | None = None,
    world_size: int | None = None,
) -> CacheSummary:
    """Make the cache ``out``, or go on with it where an earlier run stopped.

    Shards are divided among ``world_size`` processes, by default those of torchrun; all of them
    return once the cache is finished. With class-mean centres the teacher runs first and its
    embeddings are kept beside ``out`` until the end. An interruption leaves whole shards only:
    the same call goes on, with any number of processes, to the same bytes.

    Raises:
        ConfigError: where records, teacher and centres do not fit, where another run writes
            ``out``, or the disk is too small, full or closed.
        IncompleteCacheError: where another process of this run ended before its part was done.
        CorruptRecordError: at an unreadable record, unless ``settings.skip_corrupt``.
        SpecMismatchError: where ``out`` was begun with other settings, teacher or data.
        GkdError: where the teacher's output is unusable.
    """
    check_labels(records)
    run = _Run(
        records,
        out.absolute(),
        embedder,
        settings,
        torchrun_env.rank() if rank is None else rank,
        torchrun_env.world_size() if world_size is None else world_size,
    )
    return run.make(centers)


class _Run:
    """One process's part of making a cache."""

    def __init__(
        self,
        records: Records,
        out: Path,
        embedder: Embedder,
        settings: CacheSettings,
        rank: int,
        world_size: int,
    ) -> None:
        self.records, self.out, self.embedder = records, out, embedder
        self.settings, self.rank, self.world_size = settings, rank, world_size
        self.shard_samples = settings.samples_per_shard(len(records))
        self.dataset = dataset_spec(records)
        self.num_shards = -(-len(records) // self.shard_samples)
        self._mine = range(rank, self.num_shards, world_size)
        self.images = 0
        self.lock = WriteLock(self.out, rank, world_size)

    def make(self, centers: Centers | Literal["class-mean"]) -> CacheSummary:
        began = time.monotonic()
        with self.lock:
            if self.rank == 0:
                for path in (self.out, centers_path(self.out), work_path(self.out)):
                    delete_leftovers(path)
            self._write(centers)
        return _summary(self.out, self.images, time.monotonic() - began)

    def _write(self, centers: Centers | Literal["class-mean"]) -> None:
        store: EmbeddingStore | None = None
        if centers == CLASS_MEAN:
            # What the writer would refuse only after the teacher has seen every image.
            placeholder = self._spec(CentersSpec(CLASS_MEAN, CLASS_MEAN, sha256=""))
            require_writable(self.out, placeholder, unknown=["centers.sha256"])
            found = _finished_means(self.out)
            if found is None or work_path(self.out).exists():
                store = self._store()
            centers = found or self._class_means(store or self._store())
        self._check_centers(centers)
        spec = self._spec(centers.spec)
        require_room(self.out, self._rows_to_write() * len(spec.views) * SAMPLE_BYTES)
        if self.rank:
            self.lock.wait_for((self.out / layout.METADATA).exists)
        writer = CacheWriter(self.out, spec, guard=self.lock.check)
        pending = writer.pending(self.rank, self.world_size)
        written = sorted(set(self._mine).difference(pending))
        require_same_images(self.records, self.out, written, partial(_seen, self.out, spec))
        precision = self.settings.center_precision
        array = on_device(centers.array, self.embedder, precision)
        if precision != "float32":
            most, scale = max_cosine_error(centers.array, precision), self.settings.partition.scale
            torchrun_env.log_rank0(
                f"centres in {precision}: no cosine differs by more than {most:.1e} from "
                f"float32's, no logit by more than {scale * most:.1e}"
            )
        if self.rank == 0 and not committed_shards(self.out):
            self._calibrate(array, store, own_means=centers.kind == CLASS_MEAN)
        self._write_shards(writer, pending, array, store)
        if self.rank:
            self.lock.wait_for((self.out / layout.MANIFEST).exists)
            return
        # Listed until all are there, and only then read: a damaged record may be another rank's
        # to make again, and reading thousands at every look would be slow.
        every_shard = set(range(self.num_shards))
        self.lock.wait_for(
            lambda: every_shard.issubset(committed_shards(self.out)) and not writer.pending()
        )
        with disk_errors(self.out):
            write_card(self.out, licence=self.settings.licence, note=self.settings.note)
        writer.finish()
        # The others leave when they see the manifest; until then they may look into the store.
        self.lock.wait_until_alone()
        if store is not None:
            store.remove()

    def _calibrate(
        self, centers: torch.Tensor, store: EmbeddingStore | None, *, own_means: bool
    ) -> None:
        """Say whether settings and centres make sense; the other ranks do not wait for it."""
        views, workers = self.settings.views, self.settings.workers
        if store is not None:
            rows, embeddings = store.sample(views[0])
        else:
            if not own_means:
                check_preprocessing(self.records, self.embedder, views, workers=workers)
            rows, embeddings = sample_images(self.records, self.embedder, views, workers=workers)
        if len(rows):
            labels, settings = self.records.labels[rows], self.settings.partition
            report_group_sizes(embeddings, labels, centers, settings, own_means=own_means)

    def _rows(self, shard: int) -> range:
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, len(self.records)))

    def _check_centers(self, centers: Centers) -> None:
        expected = (self.records.num_classes, self.embedder.embedding_dim)
        if centers.array.shape != expected:
            raise ConfigError(
                f"{centers.name}: expected centres of {expected[0]:,} identities and embeddings "
                f"of length {expected[1]}, got {list(centers.array.shape)}; give the centres of "
                "this teacher and these records, or --centers class-mean"
            )

    def _rows_to_write(self) -> int:
        done = set(committed_shards(self.out)) if self.out.exists() else set()
        return sum(len(self._rows(shard)) for shard in range(self.num_shards) if shard not in done)

    def _spec(self, centers: CentersSpec) -> CacheSpec:
        precision = self.settings.center_precision
        if precision != "float32":
            centers = msgspec.structs.replace(centers, rounded_to=precision)
        return cache_spec(
            self.dataset,
            self.embedder,
            centers,
            self.settings.partition,
            views=self.settings.views,
            shard_samples=self.shard_samples,
        )

    def _store(self) -> EmbeddingStore:
        return EmbeddingStore(
            work_path(self.out),
            self.records,
            self.embedder,
            self.shard_samples,
            skip_corrupt=self.settings.skip_corrupt,
        )

    def _class_means(self, store: EmbeddingStore) -> Centers:
        """Centres from the embeddings of all shards, which are computed where they are missing."""
        labels = self.records.labels
        require_all_classes(self.records)
        if self.rank == 0 and not store.shards():
            check_preprocessing(self.records, self.embedder, VIEWS, workers=self.settings.workers)
        self._keep_embeddings(store)
        path = centers_path(self.out)
        ready = store.folder / "centers.npy"
        if self.rank == 0 and not ready.exists():
            self.lock.wait_for(lambda: all(map(store.has, range(self.num_shards))))
            batches = (store.load(shard, VIEWS) for shard in range(self.num_shards))
            _save_array(ready, class_means(batches, labels, self.records.num_classes))
        self.lock.wait_for(ready.exists)
        array = read_npy(ready)
        if self.rank == 0:
            _save_array(path, array)
        return Centers(array, CLASS_MEAN, CLASS_MEAN)

    def _keep_embeddings(self, store: EmbeddingStore) -> None:
        missing = [shard for shard in self._mine if not store.has(shard)]
        if not missing:
            return
        # Of all ranks, who write to the same disk.
        left = [shard for shard in range(self.num_shards) if not store.has(shard)]
        size = sum(map(len, map(self._rows, left))) * len(VIEWS) * self.embedder.embedding_dim * 4
        require_room(store.folder, size)
        rows = sum(len(self._rows(shard)) for shard in missing)
        whole = sum(len(self._rows(shard)) for shard in self._mine)
        with (
            self._progress("run teacher", whole, whole - rows) as advance,
            closing(self._live(missing, VIEWS)) as batches,
        ):
            store.keep(batches, advance)

    def _live(
        self, shards: Sequence[int], views: Sequence[View]
    ) -> Generator[EmbeddedBatch, None, None]:
        """Batches of shards, as the teacher sees them."""
        size = images_a_batch(self.embedder, self.settings.batch_size)
        spans = [rows for shard in shards for rows in cut(self._rows(shard), size)]
        for batch in embed(
            self.records,
            spans,
            self.embedder,
            views,
            workers=self.settings.workers,
            skip_corrupt=self.settings.skip_corrupt,
        ):
            self.images += len(batch.kept)
            yield batch

    def _batches(
        self, shards: Sequence[int], store: EmbeddingStore | None
    ) -> Generator[EmbeddedBatch, None, None]:
        """The same from kept embeddings, where a store has them."""
        views, size = self.settings.views, images_a_batch(self.embedder, self.settings.batch_size)
        for shard in shards:
            if store is not None and store.has(shard):
                yield from split_batch(store.load(shard, views), size)
        yield from self._live([s for s in shards if store is None or not store.has(s)], views)

    def _write_shards(
        self,
        writer: CacheWriter,
        pending: Sequence[int],
        centers: torch.Tensor,
        store: EmbeddingStore | None,
    ) -> None:
        whole = sum(len(self._rows(shard)) for shard in self._mine)
        left = sum(len(self._rows(shard)) for shard in pending)
        parts: list[PartitionedBatch] = []
        settings, class_chunk = self.settings.partition, self.settings.class_chunk
        what = "run teacher and partition" if store is None else "partition"
        with (
            AsyncShardWriter() as background,
            self._progress(what, whole, whole - left) as advance,
            closing(self._batches(pending, store)) as batches,
        ):
            for batch in batches:
                background.check()
                labels = self.records.labels[batch.rows.start + batch.kept]
                parts.append(partition_batch(batch, labels, centers, settings, class_chunk))
                advance(len(batch.rows))
                shard = batch.rows.start // self.shard_samples
                if batch.rows.stop == self._rows(shard).stop:
                    background.start(write_shard_job(writer, shard, self.records, parts))
                    parts = []

    def _progress(self, what: str, total: int, done: int) -> AbstractContextManager[Advance]:
        """This process's part; ranks share a terminal and their parts are alike, so one shows."""
        if self.world_size > 1:
            what = f"{what}, rank {self.rank} of {self.world_size}"
        return progress(what, total, "images", done, quiet_below=total + 1 if self.rank else 0)


def _seen(out: Path, spec: CacheSpec, shard: int) -> Seen:
    """Rows and digests of a written shard's images; what a manifest says is not asked."""
    table = Cache(out, spec, None, "").read_samples(shard)
    present = table["digest"].is_valid().to_numpy()
    return table["row"].to_numpy()[present], digests_of(table)[present]


def _finished_means(out: Path) -> Centers | None:
    """The class means of a cache that was begun, where they still stand beside it."""
    path = centers_path(out)
    if not (out / layout.METADATA).exists() or not path.exists():
        return None
    spec = read_spec(out)
    if spec.centers.kind != CLASS_MEAN:
        return None
    centers = Centers(read_npy(path), CLASS_MEAN, CLASS_MEAN)
    return centers if centers.spec.sha256 == spec.centers.sha256 else None


def _save_array(path: Path, array: npt.NDArray[np.float32]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with disk_errors(path):
        write_file(path, buffer.getvalue())


def _summary(out: Path, images: int, seconds: float) -> CacheSummary:
    cache = Cache.open(out)
    manifest = cache.manifest
    assert manifest is not None  # Cache.open refuses a cache without one
    with_groups = max(1, manifest.num_samples - manifest.skipped)
    return CacheSummary(
        cache_id=cache.id,
        samples=manifest.num_samples,
        skipped=manifest.skipped,
        entries=manifest.entries,
        mean_group={view: count / with_groups for view, count in manifest.entries.items()},
        truncated=manifest.truncated,
        bytes=manifest.bytes,
        images=images,
        seconds=seconds,
    )
