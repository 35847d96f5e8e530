"""Forecasts of `gkd plan` on the LFW pack against the caches that `cache-teacher` then makes.

python -m tests.benchmarks.plan

Twice: from half of the images, so that half of the class means have stand-ins, and as by default,
which for a pack of this size means that all class means are known. Times are of the runs that had
the teacher compute; the caches of the other settings are made from embeddings that those kept.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.pipeline.plan import Plan, PlanPoint, PlanSettings, plan
from gkd.pipeline.run import CLASS_MEAN, CacheSettings, cache_teacher
from gkd.pipeline.settings import PartitionSettings
from gkd.pipeline.teacher import OnnxEmbedder
from gkd.storage.cache import Cache
from gkd.storage.records import Records, open_records
from gkd.storage.spec import DrawsSpec, preprocess_preset
from gkd.storage.stats import stats
from tests.benchmarks.harness import Bar, report
from tests.paths import SHARED_DATA

TEMPERATURES = (1.0, 2.0, 4.0)
DRAWS = CacheSettings(partition=PartitionSettings(draws=DrawsSpec(64, 4.0, "all")))
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


def forecast(made: Plan, temperature: float) -> PlanPoint:
    """The point of the default threshold."""
    (point,) = (p for p in made.points if (p.group_temperature, p.threshold) == (temperature, 0.93))
    return point


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


def main() -> None:
    """Forecast, run, compare."""
    records, embedder = open_records(SHARED_DATA / "lfw"), Remembering()
    halves = PlanSettings(samples=len(records) // 8, group_temperatures=TEMPERATURES)
    plans = {"half": plan(records, embedder, CLASS_MEAN, halves)}
    truth = {2.0: cached(records, embedder, CacheSettings(), 2.0)}
    embedder.recall = True
    plans["all"] = plan(records, embedder, CLASS_MEAN, PlanSettings())
    for temperature in (1.0, 4.0):
        truth[temperature] = cached(records, embedder, CacheSettings(), temperature)
    drawn = plan(records, embedder, CLASS_MEAN, PlanSettings(cache=DRAWS))
    true_drawn = cached(records, embedder, DRAWS, 1.0)

    ratios: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    for name, made in plans.items():
        for temperature in TEMPERATURES:
            point, (size, mean, _) = forecast(made, temperature), truth[temperature]
            print(
                f"from {name}, T = {temperature:g}: mean {point.mean_size:,.1f}, true {mean:,.1f}; "
                f"{point.bytes:,} bytes, true {size:,}",
                file=sys.stderr,
            )
            ratios[f"bytes, T = {temperature:g}, from {name}: forecast / cache"] = (
                point.bytes / size
            )
            ratios[f"mean group, T = {temperature:g}, from {name}: forecast / cache"] = (
                point.mean_size / mean
            )
    for temperature in TEMPERATURES:
        what = f"bytes, T = {temperature:g}, from all: error"
        ratios[what] = abs(forecast(plans["all"], temperature).bytes / truth[temperature][0] - 1)
        bars[what] = ("<=", SIZE)
    what = "bytes with 64 draws, T = 1, from all: error"
    ratios[what] = abs(forecast(drawn, 1.0).bytes / true_drawn[0] - 1)
    bars[what] = ("<=", SIZE)
    what = "seconds, T = 2, from half: error"
    ratios[what] = abs(forecast(plans["half"], 2.0).seconds / truth[2.0][2] - 1)
    bars[what] = ("<=", TIME)
    print(
        f"{forecast(plans['half'], 2.0).seconds:.1f} s forecast, {truth[2.0][2]:.1f} s taken",
        file=sys.stderr,
    )
    report("plan", ratios, bars)


if __name__ == "__main__":
    main()
