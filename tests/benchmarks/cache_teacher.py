"""cache-teacher on real faces against the bare decode and teacher forward, both views.

python -m tests.benchmarks.cache_teacher [IMAGES]
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers import CLASS_MEAN
from gkd.pipeline.embed import CPU_BATCH, cut
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.pipeline.teacher import OnnxEmbedder
from gkd.storage.parallel import ordered_map
from gkd.storage.records import Records, open_records
from gkd.storage.spec import preprocess_preset
from tests.benchmarks.harness import in_turns, report
from tests.paths import SHARED_DATA

ROUNDS = 3
SETTINGS = CacheSettings(partition=PartitionSettings(draws=DRAWS))


def first_images(count: int) -> Records:
    """The first images of the LFW pack, whole identities."""
    records = open_records(SHARED_DATA / "lfw")
    if count < len(records):
        classes = int(records.labels[count])
        kept = np.flatnonzero(records.labels < classes)
        records.labels, records.sizes = records.labels[kept], records.sizes[kept]
        records.num_classes = classes
    return records


def decoded(records: Records) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches of faces, decoded by as many threads as cache-teacher uses."""

    def decode(rows: range) -> npt.NDArray[np.uint8]:
        return np.stack([records.image(row) for row in rows])

    batches = cut(range(len(records)), CPU_BATCH)
    return ordered_map(decode, batches, workers=SETTINGS.workers)


def bare(records: Records, embedder: OnnxEmbedder) -> None:
    """Decode, and let the teacher see both views."""
    for images in decoded(records):
        embedder(images)
        embedder(images[:, :, ::-1])


def cached(records: Records, embedder: OnnxEmbedder) -> None:
    """Make a whole cache with class-mean centres."""
    with tempfile.TemporaryDirectory() as folder:
        cache_teacher(records, Path(folder) / "lfw.gkd", embedder, CLASS_MEAN, SETTINGS)


def main() -> None:
    """Measure in turns; the median of the turns' ratios."""
    records = first_images(int(sys.argv[1]) if len(sys.argv) > 1 else 10**9)
    embedder = OnnxEmbedder(
        SHARED_DATA / "teachers" / "mobilefacenet.onnx", preprocess_preset("imagenet")
    )
    works = partial(bare, records, embedder), partial(cached, records, embedder)
    alone, whole = in_turns(works, ROUNDS).T
    for name, seconds in (("decode + teacher", alone), ("cache-teacher", whole)):
        rates = ", ".join(f"{rate:.1f}" for rate in len(records) / seconds)
        print(f"{name}: {rates} images/s", file=sys.stderr)
    ratio = "cache-teacher throughput / decode + teacher"
    report("cache_teacher", {ratio: float(np.median(alone / whole))}, {ratio: (">=", 0.9)})


if __name__ == "__main__":
    main()
