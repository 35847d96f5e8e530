"""The first stage: records and a teacher in, a cache of its primary groups out."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
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
    embed_shards,
)
from gkd.pipeline.embedding_store import EmbeddingStore, work_path
from gkd.pipeline.ranks import Ranks, joined_ranks
from gkd.pipeline.resume_check import ImageDigests, require_same_images
from gkd.pipeline.settings import CacheSettings
from gkd.pipeline.shard import Shard, commit_shard, compute_shards
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache import layout
from gkd.storage.cache.card import write_card
from gkd.storage.cache.metadata import committed_shards, read_spec, require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import digests_of
from gkd.storage.cache.spec import VIEWS, CacheSpec, CentersSpec, Sharding, View
from gkd.storage.cache.writer import CacheWriter, require_writable
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util import torchrun_env
from gkd.storage.util.files import delete_temporaries, disk_errors, publish_file, require_room
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.parallel import write_behind
from gkd.storage.util.progress import Advance, progress

SAMPLE_BYTES = 100  # per view: a rough lower bound of the disk space that a cache needs


@dataclass(frozen=True)
class CacheSummary:
    """What a finished cache holds, and what this process did for it.

    ``entries``, ``mean_group`` and ``truncated`` are by view; ``bytes`` are the whole cache's;
    ``images`` went through the teacher in this run, which took ``seconds`` in all.
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
        """Images of this run, each in all its views, per second."""
        return self.images / self.seconds


def cache_teacher(
    records: Records,
    out: Path,
    embedder: Embedder,
    centers: Centers | Literal["class-mean"],
    settings: CacheSettings,
    *,
    ranks: Ranks | None = None,
) -> CacheSummary:
    """Make the cache ``out``, or resume it where an earlier run stopped.

    Shards are divided among ``ranks``, by default those of torchrun; all of them return once the
    cache is finished. With class-mean centres the teacher runs first, and its embeddings are kept
    beside ``out`` until the end. An interruption leaves complete shards only: the same call
    resumes, with any number of processes, to the same bytes.

    Raises:
        ConfigError: if records, teacher and centres do not fit, another run writes ``out``, or the
            disk is too small, full or not writable.
        IncompleteCacheError: if another process of this run ended before its part was done.
        CorruptRecordError: at an unreadable record, unless ``settings.skip_corrupt``.
        SpecMismatchError: if ``out`` was begun with other settings, teacher or data.
        GkdError: if the teacher's output is unusable.
        SystemExit: if another rank has failed and said why.
    """
    began, out = time.monotonic(), out.absolute()
    check_labels(records)
    require_outside_caches(out, may_be_cache=True)
    with ranks or joined_ranks(embedder.device) as ranks, _locked(out, ranks) as guard:
        images = _Run(records, out, embedder, settings, ranks, guard).make(centers)
        return _summary(out, images, time.monotonic() - began)


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Hold ``out`` for these ranks; yields what to call before each write."""
    lock = WriteLock(out, ranks.run)

    def begin() -> None:
        lock.acquire()
        for path in (out, centers_path(out), work_path(out)):
            delete_temporaries(path.parent, path.name)

    def guard() -> None:
        ranks.check()
        lock.check()

    try:
        ranks.once("lock", begin)
        yield guard
    finally:
        lock.release()


@dataclass(frozen=True)
class _Run:
    """One process's part of making a cache, step by step; ``guard`` is called before each write."""

    records: Records
    out: Path
    embedder: Embedder
    settings: CacheSettings
    ranks: Ranks
    guard: Callable[[], None]

    @cached_property
    def sharding(self) -> Sharding:
        count = len(self.records)
        return Sharding(count, self.settings.samples_per_shard(count))

    @property
    def mine(self) -> range:
        return self.sharding.of_rank(self.ranks.rank, self.ranks.world_size)

    def make(self, given: Centers | Literal["class-mean"]) -> int:
        """Do all steps; the number of images that went through the teacher."""
        store, embedded, centers = None, 0, given
        if centers == CLASS_MEAN:
            store, embedded, centers = self._class_mean_centers()
        self._check_centers(centers)
        spec = self._spec(centers.spec)
        done = self.sharding.count_rows(committed_shards(self.out))
        require_room(self.out, (len(self.records) - done) * len(spec.views) * SAMPLE_BYTES)
        self.ranks.once("create", lambda: CacheWriter(self.out, spec))
        writer = CacheWriter(self.out, spec, guard=self.guard)
        pending = writer.pending(self.ranks.rank, self.ranks.world_size)
        self._check_written(spec, pending)
        array = on_device(centers.array, self.embedder, self.settings.center_precision)
        self._report_rounding(centers)
        if self.ranks.rank == 0 and not committed_shards(self.out):
            self._calibrate(array, store, own_means=centers.kind == CLASS_MEAN)
        written = self._write_shards(writer, pending, array, store)
        self.ranks.once("finish", lambda: self._finish(writer, store))
        return written if store is None else embedded

    def _class_mean_centers(self) -> tuple[EmbeddingStore | None, int, Centers]:
        """Class means, made of the embeddings of all shards unless an earlier run did so."""
        # Refuse now what the writer would refuse only after the teacher has seen every image.
        placeholder = self._spec(CentersSpec(CLASS_MEAN, CLASS_MEAN, sha256=""))
        require_writable(self.out, placeholder, unknown=["centers.sha256"])
        found, folder = _finished_means(self.out), work_path(self.out)
        if found is not None and not folder.exists():
            return None, 0, found
        store = EmbeddingStore(
            folder,
            self.records,
            self.embedder,
            self.sharding.shard_samples,
            batch_size=self.settings.batch_size,
            skip_corrupt=self.settings.skip_corrupt,
        )
        embedded = self._embed_all(store)
        if found is None:
            self.ranks.once("class means", lambda: self._average(store))
            found = Centers(read_npy(centers_path(self.out)), CLASS_MEAN, CLASS_MEAN)
        return store, embedded, found

    def _embed_all(self, store: EmbeddingStore) -> int:
        """Keep the embeddings of this rank's shards; the images that the teacher has seen."""
        require_all_classes(self.records)
        settings = self.settings
        if self.ranks.rank == 0 and not store.shards():
            check_preprocessing(self.records, self.embedder, VIEWS, workers=settings.workers)
        missing = [shard for shard in self.mine if not store.has(shard)]
        if not missing:
            return 0
        store.require_room()
        with self._progress("run teacher", missing) as advance:
            return store.fill(missing, advance, workers=settings.workers)

    def _average(self, store: EmbeddingStore) -> None:
        batches = (store.load(shard, VIEWS) for shard in range(self.sharding.num_shards))
        array = class_means(batches, self.records.labels, self.records.num_classes)
        path = centers_path(self.out)
        with disk_errors(path), publish_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def _check_centers(self, centers: Centers) -> None:
        expected = (self.records.num_classes, self.embedder.embedding_dim)
        if centers.array.shape != expected:
            raise ConfigError(
                f"{centers.name}: expected centres of {expected[0]:,} identities and embeddings "
                f"of length {expected[1]}, got {list(centers.array.shape)}; give the centres of "
                "this teacher and these records, or --centers class-mean"
            )

    def _check_written(self, spec: CacheSpec, pending: Sequence[int]) -> None:
        """Check that this rank's finished shards were made of the images that it reads."""

        def read(shard: int) -> ImageDigests:
            # What a manifest says does not matter here.
            table = Cache(self.out, spec, None, "").read_samples(shard)
            present = table["digest"].is_valid().to_numpy()
            return table["row"].to_numpy()[present], digests_of(table)[present]

        written = sorted(set(self.mine).difference(pending))
        require_same_images(self.records, self.out, written, read)

    def _report_rounding(self, centers: Centers) -> None:
        precision, scale = self.settings.center_precision, self.settings.partition.scale
        if precision != "float32":
            change = max_cosine_error(centers.array, precision)
            torchrun_env.log_rank0(
                f"centres in {precision}: no cosine differs by more than {change:.1e} from "
                f"float32's, no logit by more than {scale * change:.1e}"
            )

    def _calibrate(
        self, centers: torch.Tensor, store: EmbeddingStore | None, *, own_means: bool
    ) -> None:
        """Report whether settings and centres make sense; the other ranks do not wait for it."""
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

    def _write_shards(
        self,
        writer: CacheWriter,
        pending: Sequence[int],
        centers: torch.Tensor,
        store: EmbeddingStore | None,
    ) -> int:
        """Compute and commit the pending shards; the number of their images."""
        images = 0

        def commit(shard: Shard) -> None:
            nonlocal images
            commit_shard(writer, shard)
            images += len(shard.rows) - len(shard.samples.skipped)

        what = "run teacher and partition" if store is None else "partition"
        with (
            self._progress(what, pending) as advance,
            closing(self._batches(pending, store)) as batches,
        ):
            shards = compute_shards(
                batches,
                self.records,
                centers,
                self.settings.partition,
                self.sharding,
                class_chunk=self.settings.class_chunk,
                advance=advance,
            )
            write_behind(commit, shards)
        return images

    def _batches(
        self, shards: Sequence[int], store: EmbeddingStore | None
    ) -> Generator[EmbeddedBatch, None, None]:
        """Embeddings of shards, kept ones or new ones."""
        settings = self.settings
        if store is not None:
            return store.batches(shards, settings.views)
        return embed_shards(
            self.records,
            shards,
            self.sharding,
            self.embedder,
            settings.views,
            batch_size=settings.batch_size,
            workers=settings.workers,
            skip_corrupt=settings.skip_corrupt,
        )

    def _finish(self, writer: CacheWriter, store: EmbeddingStore | None) -> None:
        """Publish card and manifest once all ranks have written their shards."""
        with disk_errors(self.out):
            write_card(self.out, licence=self.settings.licence, note=self.settings.note)
        writer.finish()
        if store is not None:
            store.remove()

    def _spec(self, centers: CentersSpec) -> CacheSpec:
        precision = self.settings.center_precision
        if precision != "float32":
            centers = msgspec.structs.replace(centers, rounded_to=precision)
        return cache_spec(
            dataset_spec(self.records),
            self.embedder,
            centers,
            self.settings.partition,
            views=self.settings.views,
            shard_samples=self.sharding.shard_samples,
            batch_size=self.settings.batch_size,
        )

    def _progress(self, what: str, left: Sequence[int]) -> AbstractContextManager[Advance]:
        """Progress of this rank's shards; ranks share a terminal, so only the first shows its."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        if world_size > 1:
            what = f"{what}, rank {rank} of {world_size}"
        total = self.sharding.count_rows(self.mine)
        done = total - self.sharding.count_rows(left)
        return progress(what, total, "images", done, quiet_below=total + 1 if rank else 0)


def _finished_means(out: Path) -> Centers | None:
    """The class means of a cache that was begun, if they are still beside it."""
    path = centers_path(out)
    if not (out / layout.METADATA).exists() or not path.exists():
        return None
    spec = read_spec(out)
    if spec.centers.kind != CLASS_MEAN:
        return None
    centers = Centers(read_npy(path), CLASS_MEAN, CLASS_MEAN)
    return centers if centers.spec.sha256 == spec.centers.sha256 else None


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
