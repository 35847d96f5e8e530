"""Class centres made for a teacher that came without: class means, refined or not, in a file."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from gkd.pipeline.cache_spec import dataset_spec, teacher_spec
from gkd.pipeline.centers.files import METADATA, BuiltCenters, RefineSpec
from gkd.pipeline.centers.load import Centers, ClassMeans, require_all_classes
from gkd.pipeline.centers.refine import Fit, Labelled, measure, refine
from gkd.pipeline.checks.calibration import check_preprocessing
from gkd.pipeline.embed import check_labels, cut, embed, images_a_batch
from gkd.pipeline.embedding_store import EmbeddingStore, work_path
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import VIEWS, CentersKind
from gkd.storage.cache.writer import delete_leftovers
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.files import disk_errors, publish_file, require_room
from gkd.storage.util.lock import WriteLock
from gkd.storage.util.progress import progress

SUFFIX = ".safetensors"
# Embeddings that are kept, and taken into memory, at once: 34 MB of both views at 512 numbers.
PART_SAMPLES = 8192
MEASURED = 20_000


@dataclass(frozen=True)
class BuildSummary:
    """Class centres that were made.

    sha256      of the centres, as a cache names it
    images      with embeddings; ``skipped`` could not be read
    measured    images in whose original view the fit was measured, evenly taken
    class_mean  how the class means fit; ``refined`` None where they stayed
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
    """Write the class means of both views' embeddings to ``out``, refined as ``settings`` say.

    Embeddings are kept beside ``out`` until the end: the same call goes on after an interruption.

    Raises:
        ConfigError: where ``out`` is there already or no .safetensors, another run writes it, an
            identity has no image, or the disk is full or closed.
        CorruptRecordError: at an unreadable record, unless ``skip_corrupt``.
        SpecMismatchError: where embeddings of another teacher or data set are kept beside ``out``.
        GkdError: where the teacher's output is unusable.
    """
    began, out = time.monotonic(), out.absolute()
    _require_new(out)
    check_labels(records)
    require_all_classes(records)
    with WriteLock(out):
        for path in (out, work_path(out)):
            delete_leftovers(path)
        made = _Build(records, out, embedder, batch_size, workers, skip_corrupt)
        made.keep_embeddings()
        array, sample = made.class_means(), made.sample()
        device = embedder.device if torch.cuda.is_available() else "cpu"
        before, after = measure(array, *sample, device=device), None
        if settings is not None:
            seen = len(VIEWS) * made.images
            array = refine(array, len(made.parts), made.load, settings, images=seen, device=device)
            after = measure(array, *sample, device=device)
        centers = Centers(array, "class-mean" if settings is None else "refined", out.name)
        made.write(centers, settings)
        made.store.remove()
    return BuildSummary(
        path=str(out),
        kind=centers.kind,
        centers=len(array),
        embedding_dim=array.shape[1],
        sha256=centers.spec.sha256,
        images=made.images,
        skipped=len(records) - made.images,
        measured=len(sample[1]),
        class_mean=before,
        refined=after,
        seconds=time.monotonic() - began,
    )


def _require_new(out: Path) -> None:
    if out.suffix != SUFFIX:
        raise ConfigError(
            f"{out}: expected a name that ends in {SUFFIX}, which holds what the centres are of "
            "beside them; give such a name"
        )
    if out.exists():
        raise ConfigError(f"{out}: is there already; name another file, or remove it first")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it, or write elsewhere")


class _Build:
    """Records, a teacher, and its embeddings in parts that are kept beside ``out``."""

    def __init__(
        self,
        records: Records,
        out: Path,
        embedder: Embedder,
        batch_size: int | None,
        workers: int,
        skip_corrupt: bool,
    ) -> None:
        self.records, self.out, self.embedder = records, out, embedder
        self.batch_size = images_a_batch(embedder, batch_size)
        self.workers, self.skip_corrupt = workers, skip_corrupt
        self.images = 0
        self.store = EmbeddingStore(
            work_path(out), records, embedder, PART_SAMPLES, skip_corrupt=skip_corrupt
        )
        self.parts = range(self.store.num_shards)

    def keep_embeddings(self) -> None:
        """Run the teacher over what is not kept yet."""
        missing = [self.store.rows(part) for part in self.parts if not self.store.has(part)]
        if not missing:
            return
        whole, left = len(self.records), sum(map(len, missing))
        require_room(self.out, left * len(VIEWS) * self.embedder.embedding_dim * 4)
        if not self.store.shards():
            check_preprocessing(self.records, self.embedder, VIEWS, workers=self.workers)
        batches = [rows for part in missing for rows in cut(part, self.batch_size)]
        made = embed(
            self.records,
            batches,
            self.embedder,
            VIEWS,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
        )
        with progress("run teacher", whole, "images", whole - left) as advance, closing(made):
            self.store.keep(made, advance)

    def class_means(self) -> npt.NDArray[np.float32]:
        """Class means [C, D]; counts the images as well."""
        means = ClassMeans(self.records.num_classes, self.embedder.embedding_dim)
        self.images = 0
        for part in self.parts:
            batch = self.store.load(part, VIEWS)
            labels = self.records.labels[batch.rows.start + batch.kept]
            self.images += len(labels)
            for view in VIEWS:
                means.add(batch.embeddings[view], labels)
        return means.finish()

    def load(self, part: int) -> Labelled:
        """Embeddings of both views of a part, and their labels."""
        batch = self.store.load(part, VIEWS)
        labels = self.records.labels[batch.rows.start + batch.kept]
        return (
            np.concatenate([batch.embeddings[view] for view in VIEWS]),
            np.concatenate([labels] * len(VIEWS)),
        )

    def sample(self) -> Labelled:
        """At most ``MEASURED`` images, evenly taken, in their original view."""
        step = -(-len(self.records) // MEASURED)
        found: list[Labelled] = []
        for part in self.parts:
            batch = self.store.load(part, VIEWS[:1])
            rows = batch.rows.start + batch.kept
            taken = rows % step == 0
            found.append((batch.embeddings["original"][taken], self.records.labels[rows[taken]]))
        embeddings, labels = zip(*found, strict=True)
        return np.concatenate(embeddings), np.concatenate(labels)

    def write(self, centers: Centers, settings: RefineSpec | None) -> None:
        """Publish the centres, with what they are of among the file's metadata."""
        assert centers.kind != "file"
        built = BuiltCenters(
            centers.kind,
            teacher_spec(self.embedder),
            self.embedder.preprocess,
            self.embedder.precision,
            dataset_spec(self.records),
            settings,
        )
        text = msgspec.json.encode(built).decode()
        with disk_errors(self.out), publish_file(self.out) as aside:
            save_file({"centers": centers.array}, aside, {METADATA: text})
