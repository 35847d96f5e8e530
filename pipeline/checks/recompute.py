"""Verification of a cache by its teacher: a random sample of targets is recomputed, densely.

Logits of all classes are computed for a few images at a time, and compared with the targets by
none of the code that made the cache. Differences are natural logs of probabilities, so they mean
the same for p = 0.9 and for p = 1e-9.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from gkd.pipeline.centers.load import CLASS_MEAN, Centers, load_centers, round_centers
from gkd.pipeline.centers.means import centers_path, class_means
from gkd.pipeline.checks.differences import (
    Differences,
    allowed_differences,
    compare,
    draw_log_probs,
    largest,
)
from gkd.pipeline.checks.draw_test import DrawCounts, DrawTest
from gkd.pipeline.embed import embed_shards, join_batches, whole_shards
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, CacheSpec
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.records.digests import digests
from gkd.storage.records.images import digest
from gkd.storage.util.progress import progress
from gkd.storage.util.text import describe_differences, first_few
from gkd.storage.util.torchrun_env import log_rank0

BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class AgainstReport:
    """Result of a recomputation.

    ``targets`` counts the sampled images in all views; ``other_groups`` of them differ from the
    primary group in some class (which rounding may cause at its end), ``wrong`` differ by more than
    is allowed, ``first_wrong`` names the first of these. ``drawn`` tests all draws and
    ``first_drawn`` the first quarter of each sample's, which must be draws too; None without draws.
    """

    images: int
    targets: int
    seed: int
    found: Differences
    allowed: Differences
    other_groups: int
    wrong: int
    first_wrong: str
    drawn: DrawTest | None = None
    first_drawn: DrawTest | None = None

    @property
    def ok(self) -> bool:
        """Whether every sampled target is the teacher's, to the stored precision."""
        tests = (self.drawn, self.first_drawn)
        return not self.wrong and all(test is None or test.ok for test in tests)


def verify_against(
    cache: Cache,
    records: Records,
    embedder: Embedder,
    centers: Centers,
    *,
    sample: int = 256,
    seed: int = 0,
    workers: int = 2,
) -> AgainstReport:
    """Recompute the targets of ``sample`` images of the cache, chosen by ``seed``.

    Raises:
        ConfigError: if ``sample`` is less than 1.
        SpecMismatchError: if teacher or centres are not those that the cache names, or images of
            the sample are not among the records.
        CorruptShardError: if the cache is damaged.
        CorruptRecordError: if an image cannot be read.
    """
    spec = cache.spec
    _require_named(spec, embedder, centers)
    if sample < 1:
        raise ConfigError(f"sample: expected 1 or more, got {sample}")
    samples = cache.samples()
    present = np.flatnonzero(samples.present)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(present, min(sample, len(present)), replace=False))
    record_rows = _find(cache, records, rows, samples.digests[rows], workers=workers)
    # With the rounding of the centres from which the cache's logits were computed.
    array = round_centers(centers.array, spec.centers.precision).float().numpy()

    allowed = allowed_differences(spec)
    found: list[Differences] = []
    wrong: list[str] = []
    counts, first_counts = DrawCounts(), DrawCounts()
    labels = samples.labels[rows]
    recomputed = _recompute(spec, records, embedder, array, record_rows, labels)
    with progress("recompute", len(rows), "images") as advance:
        for i, (stored, logits) in enumerate(zip(_stored(cache, rows), recomputed, strict=True)):
            label = int(labels[i])
            for view, targets, exact in zip(spec.views, stored, logits, strict=True):
                found.append(compare(spec, targets, label, exact))
                if targets.draws is not None:
                    draws, log_probs = targets.draws.classes[0], draw_log_probs(spec, label, exact)
                    counts.add(draws, log_probs)
                    first_counts.add(draws[: -(-len(draws) // 4)], log_probs)
                if found[-1].exceed(allowed):
                    where = records.where(int(record_rows[i]))
                    wrong.append(f"{where}, row {rows[i]} of the cache, {view} view")
            advance()
    return AgainstReport(
        images=len(rows),
        targets=len(found),
        seed=seed,
        found=largest(found),
        allowed=allowed,
        other_groups=sum(differences.membership > 0 for differences in found),
        wrong=len(wrong),
        first_wrong=wrong[0] if wrong else "",
        drawn=counts.test() if spec.draws else None,
        first_drawn=first_counts.test() if spec.draws else None,
    )


def named_centers(
    cache: Cache, files: Sequence[Path], records: Records, embedder: Embedder, *, workers: int
) -> Centers:
    """Centres from files or, if there are none and these are class means, the class means.

    They are in a file beside the cache, whatever its name, or are computed again: the cache's
    shards and batch size determine the order of all sums, so on one kind of device the bits are
    the same.

    Raises:
        ConfigError: if a file is missing or contains no centres of this shape, or none are given
            and the cache's are not class means of these records.
        SpecMismatchError: if their number is not that of the cache's classes, or class means that
            were computed again are others.
        CorruptRecordError: if an image cannot be read that the cache does not lack.
    """
    spec = cache.spec
    size, kind, name = spec.teacher.embedding_dim, spec.centers.kind, spec.centers.name
    if files:
        return Centers(load_centers(files, spec.num_classes, size), kind, name)
    ask = "ask those who made the cache for its centres and give them by --centers FILE"
    missing = f"expected its centres ({kind}: {name}), got none"
    if kind != CLASS_MEAN:
        raise ConfigError(missing, path=cache.path, remedy=ask)
    for file in sorted(cache.path.absolute().parent.glob(centers_path(Path("*.gkd")).name)):
        with suppress(GkdError):  # those of another cache
            found = Centers(load_centers(file, spec.num_classes, size), kind, name)
            if found.spec.sha256 == spec.centers.sha256:
                return found
    if records.fingerprint != spec.dataset.fingerprint:
        raise ConfigError(
            f"{missing}; they can be computed again only from the records that it was made from "
            f"({spec.dataset.name}), with labels in the same order, and {records.path} differs",
            path=cache.path,
            remedy=f"give those records, or {ask}",
        )
    _require_named(spec, embedder, None)
    log_rank0(
        f"{cache.path}: no file beside it holds its class means, so they are computed again: the "
        f"teacher runs over all {len(records):,} images (--centers FILE saves that)"
    )
    batches = embed_shards(
        records,
        range(spec.num_shards),
        spec.sharding,
        embedder,
        VIEWS,
        batch_size=None if spec.batch_size is UNSET else spec.batch_size,
        workers=workers,
        skip_corrupt=not cache.samples().present.all(),
    )
    with progress("run teacher", len(records), "images") as advance, closing(batches):
        shards = map(join_batches, whole_shards(batches, spec.sharding, advance))
        means = Centers(class_means(shards, records.labels, spec.num_classes), kind, name)
    if means.spec.sha256 != spec.centers.sha256:
        raise SpecMismatchError(
            "class means that were computed again",
            path=cache.path,
            expected=f"the sha256 {spec.centers.sha256}",
            got=f"{means.spec.sha256}: images, or the last bits of another device, differ",
            remedy=ask,
        )
    return means


def _require_named(spec: CacheSpec, embedder: Embedder, centers: Centers | None) -> None:
    """``centers`` are compared unless they are None."""
    teacher = spec.teacher
    named = teacher.sha256, teacher.embedding_dim, spec.preprocess, spec.precision
    given = embedder.sha256, embedder.embedding_dim, embedder.preprocess, embedder.precision
    sha256 = spec.centers.sha256 if centers is None else centers.spec.sha256
    fields = "teacher's sha256", "embedding_dim", "preprocess", "precision", "centres' sha256"
    differences = describe_differences(
        dict(zip(fields, (*named, spec.centers.sha256), strict=True)),
        dict(zip(fields, (*given, sha256), strict=True)),
    )
    if differences:
        raise SpecMismatchError(
            f"the cache names the teacher {teacher.name} and the centres {spec.centers.name}, "
            "which differ from the given ones:\n  "
            + "\n  ".join(differences)
            + "\nGive those that the cache names."
        )


def _find(
    cache: Cache,
    records: Records,
    rows: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.uint8],
    *,
    workers: int,
) -> npt.NDArray[np.int64]:
    """The records' row for each sampled row of the cache, by the digest of the image."""
    if records.fingerprint == cache.spec.dataset.fingerprint:
        found = [np.frombuffer(digest(records.encoded(int(row))), np.uint8) for row in rows]
        if np.array_equal(found, wanted):
            return rows
    known = {key.tobytes(): row for row, key in enumerate(digests(records, workers=workers))}
    record_rows = np.array([known.get(key.tobytes(), -1) for key in wanted], np.int64)
    missing = rows[record_rows < 0]
    if len(missing):
        keys = first_few(cache.samples().keys(missing[:3]), count=len(missing))
        raise SpecMismatchError(
            f"{len(missing)} of {len(rows)} sampled images of {cache.path} are not in "
            f"{records.path}, by key: {keys}; give the records that the cache was made from "
            f"({cache.spec.dataset.name})"
        )
    return record_rows


def _stored(cache: Cache, rows: npt.NDArray[np.int64]) -> Iterator[list[SparseTargets]]:
    """Targets of each of ``rows``, ascending, in all views; each shard is read once."""
    spec = cache.spec
    for shard in np.unique(rows // spec.shard_samples).tolist():
        views = [cache.read_shard(shard, view) for view in spec.views]
        inside = spec.shard_rows(shard)
        for row in rows[(rows >= inside.start) & (rows < inside.stop)].tolist():
            own = range(row - inside.start, row - inside.start + 1)
            yield [targets.slice(own) for targets in views]


def _recompute(
    spec: CacheSpec,
    records: Records,
    embedder: Embedder,
    centers: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
) -> Iterator[list[npt.NDArray[np.float64]]]:
    """Logits [C] of each of the records' ``rows`` in all views, computed a batch at a time."""
    size = max(1, min(64, BATCH_LOGITS // spec.num_classes))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        images = np.stack([records.image(int(row)) for row in rows[part]])
        by_view = embedder.start(images, spec.views)()
        logits = []
        for embeddings in (by_view[view] for view in spec.views):
            # z = scale * (cos - margin * [class = label])
            unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
            cosines = unit @ centers.T
            cosines[np.arange(len(images)), labels[part]] -= spec.margin
            logits.append(np.asarray(spec.scale * cosines, np.float32))
        for i in range(len(images)):
            yield [of_view[i].astype(np.float64) for of_view in logits]
