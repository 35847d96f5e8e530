"""What a cache costs on disk, and how fast its targets are read.

``python -m tests.benchmarks.targets`` makes synthetic caches and measures: bytes a sample against a
raw CSR file; lookups of 512 shuffled samples against numpy on raw memory-mapped CSR files, small
groups and large; and an epoch of decoding with two workers with and without targets. Everything
that is compared is measured turn by turn. Of lookups the best turn counts: noise only ever adds. An
epoch's processor time, that of all its processes, still wanders by a tenth with what else the
machine does, so of many turns the median of their ratios counts, every other turn in turned order.
"""

import functools
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.demo.synthetic import draw_faces
from gkd.storage.analysis.stats import stats
from gkd.storage.cache.reader import Cache
from gkd.storage.reading.mmap_store import TargetStore, materialise
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.open import open_records
from gkd.trainer.data.dataset import FaceBatches, JoinedTargets
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.data.sampler import BatchSampler
from tests.benchmarks.harness import Bar, in_turns, report
from tests.benchmarks.synthetic_cache import make_cache

CLASSES = 93_431
BATCH = 512
ROUNDS, EPOCH_ROUNDS = 7, 41
SMALL = (262_144, 19.0, 1024)
LARGE = (16_384, 2000.0, 8192)
IMAGES, TRAINING_BATCH = 16_384, 128


class RawCsr:
    """What one would write by hand: CSR in memory-mapped files, and numpy indexing."""

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.indices = np.load(folder / "indices.npy", mmap_mode="r")
        self.log2_probs = np.load(folder / "log2_probs.npy", mmap_mode="r")
        self.secondary = np.load(folder / "secondary.npy", mmap_mode="r")

    def lookup(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.generic], ...]:
        starts, stops = self.offsets[rows], self.offsets[rows + 1]
        offsets = np.concatenate([[0], np.cumsum(stops - starts)])
        places = np.repeat(starts - offsets[:-1], stops - starts) + np.arange(offsets[-1])
        return offsets, self.indices[places], self.log2_probs[places], self.secondary[rows]


def processor_seconds() -> float:
    """Spent so far by this process and by those of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def lookup_speeds(store: TargetStore) -> tuple[float, float, float]:
    """Samples a second by our lookup and by raw CSR, and entries a sample."""
    order = np.random.default_rng(0).permutation(len(store))
    batches = [order[at : at + BATCH] for at in range(0, min(len(order), 131_072), BATCH)]
    flipped = np.zeros(BATCH, bool)
    raw = RawCsr(store.path)
    entries = sum(len(store.lookup(rows, flipped).indices) for rows in batches)

    def ours() -> None:
        for rows in batches:
            store.lookup(rows, flipped)

    def theirs() -> None:
        for rows in batches:
            raw.lookup(rows)

    count = len(batches) * BATCH
    mine, other = in_turns([ours, theirs], ROUNDS).min(0)
    return count / mine, count / other, entries / count


def bytes_per_sample(cache: Cache) -> tuple[float, float, float]:
    """Of all arrays of the view, of raw CSR files that hold the same, and of masses in these.

    Raw CSR takes 8 bytes a sample for its offset, 6 an entry, and 4 a mass.
    """
    (view,) = stats(cache).views
    masses = 4.0 * len(cache.spec.temperatures)
    return view.bytes_per_sample, 8 + 6 * view.entries / cache.spec.num_samples + masses, masses


def epoch(dataset: FaceBatches, plans: BatchSampler, workers: int) -> None:
    for _ in BatchLoader(dataset, plans, workers=workers, pin=False):
        pass


def epoch_seconds(folder: Path) -> npt.NDArray[np.float64]:
    """Processor seconds [rounds, 3] of two workers: without targets, with them, in blocks."""
    cache = make_cache(
        folder / "epoch",
        num_samples=IMAGES,
        num_classes=CLASSES,
        mean_group=19.0,
        max_group=1024,
        shard_samples=2048,
    )
    store = materialise(cache, folder=folder)
    draw_faces(folder / "faces", identities=range(64), images_each=8, seed=0, workers=2)
    drawn = open_records(folder / "faces")
    chosen = np.random.default_rng(0).integers(0, len(drawn), IMAGES)
    records: Records = Subset(drawn, chosen, CLASSES)
    rows = np.random.default_rng(1).permutation(IMAGES)
    plans = BatchSampler(IMAGES, TRAINING_BATCH, 1, 0, flip=False)
    full = JoinedTargets(store, rows, CLASSES)
    streamed = JoinedTargets(ShardStore(cache), rows, CLASSES)
    ways = [
        (FaceBatches(records, None, temperature=4.0), plans),
        (FaceBatches(records, full, temperature=4.0), plans),
        (
            FaceBatches(records, streamed, temperature=4.0),
            BatchSampler(IMAGES, TRAINING_BATCH, 1, 0, flip=False, blocks=streamed.blocks(2)),
        ),
    ]
    works = [functools.partial(epoch, *way, 2) for way in ways]
    return in_turns(works, EPOCH_ROUNDS, processor_seconds)


def main() -> None:
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n, mean, most = SMALL
        cache = make_cache(
            folder / "small", num_samples=n, num_classes=CLASSES, mean_group=mean, max_group=most
        )
        ours, raw, masses = bytes_per_sample(cache)
        print(f"{ours:.1f} bytes a sample, raw CSR {raw:.1f}", file=sys.stderr)
        ratios["bytes a sample / raw CSR"] = ours / raw
        ratios["bytes a sample / raw CSR without its masses"] = ours / (raw - masses)
        store = materialise(cache, folder=folder)
        speed, raw_speed, entries = lookup_speeds(store)
        print(f"{speed:,.0f} samples/s of {entries:.1f}, raw {raw_speed:,.0f}", file=sys.stderr)
        ratios["lookup / raw memmap CSR"] = speed / raw_speed
        ratios["lookup, samples a second"] = speed
        turns = epoch_seconds(folder)
        plain, with_targets, in_blocks = np.median(turns, axis=0)
        shown = f"with targets {with_targets:.2f} s, in blocks {in_blocks:.2f} s"
        print(f"epoch {plain:.2f} s, {shown}", file=sys.stderr)
        quotients = np.median(turns[:, :1] / turns, axis=0)
        ratios["epoch of two workers without / with targets"] = float(quotients[1])
        ratios["epoch of two workers without / with targets in blocks"] = float(quotients[2])

        n, mean, most = LARGE
        cache = make_cache(
            folder / "large",
            num_samples=n,
            num_classes=CLASSES,
            mean_group=mean,
            max_group=most,
            shard_samples=4096,
        )
        speed, raw_speed, entries = lookup_speeds(materialise(cache, folder=folder))
        print(f"{speed:,.0f} samples/s of {entries:.0f}, raw {raw_speed:,.0f}", file=sys.stderr)
        ratios["lookup of large groups / raw memmap CSR"] = speed / raw_speed
    bars: dict[str, Bar] = {
        "bytes a sample / raw CSR": ("<=", 0.62),
        "lookup / raw memmap CSR": (">=", 0.8),
        "lookup, samples a second": (">=", 1e6),
        "epoch of two workers without / with targets": (">=", 0.97),
        "lookup of large groups / raw memmap CSR": (">=", 0.7),
    }
    report("targets", ratios, bars)


if __name__ == "__main__":
    main()
