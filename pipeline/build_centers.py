"""``gkd centers build``: class centres for a teacher without published ones, written to a file."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from gkd.pipeline.cache_spec import dataset_spec, teacher_spec
from gkd.pipeline.centers.files import METADATA, BuiltCenters, RefineSpec
from gkd.pipeline.centers.load import Centers
from gkd.pipeline.centers.means import class_means, require_all_classes
from gkd.pipeline.centers.refine import Fit, Labelled, measure, refine
from gkd.pipeline.checks.calibration import check_preprocessing
from gkd.pipeline.embed import check_labels
from gkd.pipeline.embedding_store import EmbeddingStore, work_path
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.spec import VIEWS, CentersKind
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.files import delete_temporaries, disk_errors, publish_file
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.progress import progress

SUFFIX = ".safetensors"
# Embeddings that are stored, and loaded into memory, at once: 34 MB of both views for D = 512.
PART_SAMPLES = 8192
MAX_MEASURED = 20_000


@dataclass(frozen=True)
class BuildSummary:
    """Class centres that were built.

    sha256      of the centres, as in a cache's metadata
    images      number with embeddings; ``skipped`` could not be read
    measured    images, evenly spaced, on whose original views the fit was measured
    class_mean  fit of the class means; ``refined`` that of the refined centres, if there are any
    """

    path: str
    kind: CentersKind
    centers: int
    embedding_dim: int
    sha256: str
    images: int
    skipped: int
    measured: int
    class_mean: Fit
    refined: Fit | None
    seconds: float


def build_centers(
    records: Records,
    out: Path,
    embedder: Embedder,
    *,
    settings: RefineSpec | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    skip_corrupt: bool = False,
) -> BuildSummary:
    """Write the class means of both views' embeddings to ``out``, refined if ``settings`` say so.

    Embeddings are stored beside ``out`` until the end: the same call resumes after an interruption.

    Raises:
        ConfigError: if ``out`` exists or is no .safetensors file, another run writes it, an
            identity has no image, or the disk is full or read-only.
        CorruptRecordError: at an unreadable record, unless ``skip_corrupt``.
        SpecMismatchError: if the stored embeddings are of another teacher or data set.
        GkdError: if the teacher's output is unusable.
    """
    began, out = time.monotonic(), out.absolute()
    if out.suffix != SUFFIX:
        raise ConfigError(
            f"{out}: expected a file name with the suffix {SUFFIX}, as the file also records the "
            "origin of the centres; choose such a name"
        )
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another name, or remove it first")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; create it, or write elsewhere")
    check_labels(records)
    require_all_classes(records)
    device = embedder.device if torch.cuda.is_available() else "cpu"
    require_outside_caches(out)
    with WriteLock(out):
        for path in (out, work_path(out)):
            delete_temporaries(path.parent, path.name)
        store = EmbeddingStore(
            work_path(out),
            records,
            embedder,
            PART_SAMPLES,
            batch_size=batch_size,
            skip_corrupt=skip_corrupt,
        )
        if missing := store.missing():
            store.require_room()
            if not store.shards():
                check_preprocessing(records, embedder, VIEWS, workers=workers)
            done = len(records) - store.sharding.count_rows(missing)
            with progress("run teacher", len(records), "images", done) as advance:
                store.fill(missing, advance, workers=workers)
        parts = range(store.sharding.num_shards)
        images = sum(len(store.load(part, []).kept) for part in parts)
        array = class_means(
            (store.load(part, VIEWS) for part in parts), records.labels, records.num_classes
        )
        sample = _sample(store, records.labels)
        before, after = measure(array, *sample, device=device), None
        if settings is not None:
            seen = len(VIEWS) * images
            load = partial(_load, store, records.labels)
            array = refine(array, len(parts), load, settings, images=seen, device=device)
            after = measure(array, *sample, device=device)
        kind: Literal["class-mean", "refined"] = "class-mean" if settings is None else "refined"
        origin = BuiltCenters(
            kind,
            teacher_spec(embedder),
            embedder.preprocess,
            embedder.precision,
            dataset_spec(records),
            settings,
        )
        metadata = {METADATA: msgspec.json.encode(origin).decode()}
        with disk_errors(out), publish_file(out) as temporary:
            save_file({"centers": array}, temporary, metadata)
        store.remove()
    return BuildSummary(
        path=str(out),
        kind=kind,
        centers=len(array),
        embedding_dim=array.shape[1],
        sha256=Centers(array, kind, out.name).spec.sha256,
        images=images,
        skipped=len(records) - images,
        measured=len(sample[1]),
        class_mean=before,
        refined=after,
        seconds=time.monotonic() - began,
    )


def _load(store: EmbeddingStore, labels: npt.NDArray[np.int64], part: int) -> Labelled:
    """Embeddings of both views of a part, and their labels."""
    batch = store.load(part, VIEWS)
    own = labels[batch.rows.start + batch.kept]
    return np.concatenate([batch.embeddings[view] for view in VIEWS]), np.tile(own, len(VIEWS))


def _sample(store: EmbeddingStore, labels: npt.NDArray[np.int64]) -> Labelled:
    """At most ``MAX_MEASURED`` images, evenly spaced, in their original view."""
    step = -(-len(labels) // MAX_MEASURED)
    samples = []
    for part in range(store.sharding.num_shards):
        batch = store.load(part, VIEWS[:1])
        rows = batch.rows.start + batch.kept
        chosen = rows % step == 0
        samples.append((batch.embeddings["original"][chosen], labels[rows[chosen]]))
    embeddings, own = zip(*samples, strict=True)
    return np.concatenate(embeddings), np.concatenate(own)
