"""cache-teacher on real faces against the bare decode and teacher forward, both views.

python -m tests.benchmarks.cache_teacher [IMAGES]
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.embed import CPU_BATCH, split_rows
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.storage.util.parallel import ordered_map
from tests.benchmarks.harness import report
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

    batches = split_rows(range(len(records)), CPU_BATCH)
    return ordered_map(decode, batches, workers=SETTINGS.workers)


def bare(records: Records, embedder: OnnxEmbedder) -> float:
    """Seconds of decoding and of the teacher on both views."""
    began = time.perf_counter()
    for images in decoded(records):
        embedder(images)
        embedder(images[:, :, ::-1])
    return time.perf_counter() - began


def cached(records: Records, embedder: OnnxEmbedder) -> float:
    """Seconds of a whole cache with class-mean centres."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache_teacher(records, Path(folder) / "lfw.gkd", embedder, CLASS_MEAN, SETTINGS)
        return time.perf_counter() - began


def main() -> None:
    """Measure both alternately, the best of ROUNDS each."""
    records = first_images(int(sys.argv[1]) if len(sys.argv) > 1 else 10**9)
    embedder = OnnxEmbedder(
        SHARED_DATA / "teachers" / "mobilefacenet.onnx", preprocess_preset("imagenet")
    )
    times = [(bare(records, embedder), cached(records, embedder)) for _ in range(ROUNDS)]
    alone, whole = (min(column) for column in zip(*times, strict=True))
    for name, seconds in (("decode + teacher", alone), ("cache-teacher", whole)):
        print(f"{name}: {len(records) / seconds:.1f} images/s", file=sys.stderr)
    ratio = "cache-teacher throughput / decode + teacher"
    report("cache_teacher", {ratio: alone / whole}, {ratio: (">=", 0.9)})


if __name__ == "__main__":
    main()
