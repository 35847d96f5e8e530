"""Forecasts of `gkd plan` on the LFW pack against the caches that `cache-teacher` then makes.

python -m tests.benchmarks.plan

From half and from a fifth of the images, so that synthetic centres replace the other class means,
and with the default, which for a pack of this size means that all class means are known. Times are
of runs on a part of the pack, alternating with their forecasts; all sizes are from embeddings that
were computed once.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.plan import sample as plan_sample
from gkd.pipeline.plan.forecast import Plan, PlanSettings, plan
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.analysis.stats import stats
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.open import open_records
from tests.benchmarks.harness import Bar, report
from tests.paths import SHARED_DATA

SEEDS = range(4)
PART, ROUNDS = 1000, 7  # identities that are timed, and how often
THRESHOLD = 0.93
DEFAULTS = CacheSettings()
WITH_DRAWS = CacheSettings(partition=PartitionSettings(draws=DRAWS))
SIZE, TIME = 0.05, 0.2


class Remembering(OnnxEmbedder):
    """Keeps every embedding that it computes, and gives it again where ``recall`` is set."""

    recall = False

    def __init__(self) -> None:
        self.kept: dict[bytes, npt.NDArray[np.float32]] = {}
        path = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
        super().__init__(path, preprocess_preset("imagenet"))

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embeddings float32 [B, D], computed or remembered."""
        keys = [image[::8].tobytes() for image in images]
        ours = self.preprocess == preprocess_preset("imagenet")
        if self.recall and ours and all(key in self.kept for key in keys):
            return np.stack([self.kept[key] for key in keys])
        embeddings = super().__call__(images)
        if ours:
            self.kept |= dict(zip(keys, embeddings, strict=True))
        return embeddings


def cached(
    records: Records, embedder: OnnxEmbedder, settings: CacheSettings, temperature: float
) -> tuple[int, float, float]:
    """Bytes on disk, mean group size and seconds of a real cache."""
    partition = replace(settings.partition, group_temperature=temperature)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lfw.gkd"
        began = time.perf_counter()
        cache_teacher(records, out, embedder, CLASS_MEAN, replace(settings, partition=partition))
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        mean = np.mean([view.mean_size for view in stats(Cache.open(out)).views])
        return size, float(mean), seconds


def times(records: Records, embedder: OnnxEmbedder) -> float:
    """Seconds forecast / taken, of a part of the pack: median of rounds, as others use machines."""
    kept = np.flatnonzero(records.labels < PART)
    part = Subset(records, kept, num_classes=PART)
    settings = PlanSettings(
        samples=len(part) // 8, group_temperatures=(2.0,), thresholds=(THRESHOLD,)
    )
    found = []
    for _ in range(ROUNDS):
        forecast = plan(part, embedder, CLASS_MEAN, settings).points[0].seconds
        _, _, taken = cached(part, embedder, DEFAULTS, 2.0)
        print(f"T = 2: {forecast:.1f} s forecast from half, {taken:.1f} s taken", file=sys.stderr)
        found.append(forecast / taken)
    return median(found)


def main() -> None:
    """Forecast, run, compare."""
    records, embedder = open_records(SHARED_DATA / "lfw"), Remembering()
    ratios: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    share = {"all": 4096, "half": len(records) // 8, "a fifth": len(records) // 20}

    def made(samples: str, seed: int = 0, cache: CacheSettings = DEFAULTS) -> Plan:
        plan_sample.SEED = seed
        settings = PlanSettings(cache=cache, samples=share[samples], thresholds=(THRESHOLD,))
        return plan(records, embedder, CLASS_MEAN, settings)

    ratios["seconds, T = 2, from half: forecast / cache-teacher"] = times(records, embedder)
    what = "seconds, T = 2, from half: error"
    ratios[what] = abs(ratios["seconds, T = 2, from half: forecast / cache-teacher"] - 1)
    bars[what] = ("<=", TIME)

    truth = {2.0: cached(records, embedder, DEFAULTS, 2.0)}
    embedder.recall = True
    for temperature in (1.0, 4.0):
        truth[temperature] = cached(records, embedder, DEFAULTS, temperature)
    for name in share:
        plans = [made(name, seed) for seed in SEEDS]
        for number, (temperature, (size, mean, _)) in enumerate(sorted(truth.items())):
            points = [each.points[number] for each in plans]
            groups = " ".join(f"{point.mean_size:,.1f}" for point in points)
            forecast = " ".join(f"{point.bytes / size:.3f}" for point in points)
            print(
                f"from {name}, T = {temperature:g}: mean groups {groups}, true {mean:,.1f}; "
                f"bytes {forecast} of the true {size:,}",
                file=sys.stderr,
            )
            what = f"bytes, T = {temperature:g}, from {name}: largest error of {len(SEEDS)} samples"
            ratios[what] = max(abs(point.bytes / size - 1) for point in points)
            if name != "a fifth":
                bars[what] = ("<=", SIZE)
            if name != "all":
                errors = [point.error for point in points if point.error]
                ratios[f"bytes, T = {temperature:g}, from {name}: forecast standard error"] = max(
                    errors
                )
    what = "bytes with 64 draws, T = 1, from all: error"
    size, _, _ = cached(records, embedder, WITH_DRAWS, 1.0)
    ratios[what] = abs(made("all", cache=WITH_DRAWS).points[0].bytes / size - 1)
    bars[what] = ("<=", SIZE)
    report("plan", ratios, bars)


if __name__ == "__main__":
    main()
