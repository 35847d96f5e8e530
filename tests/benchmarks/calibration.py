"""The check of the preprocessing on the LFW pack: how often each preset is noticed, over samples.

python -m tests.benchmarks.calibration

The shared teacher takes ImageNet's mean and deviation in RGB. Two images of every identity that has
them are embedded by each preset; then samples of as many pairs as 10,562 images are worth are drawn
and checked as `cache-teacher` checks its one sample.
"""

import sys

import numpy as np

from gkd.pipeline.checks.calibration import (
    PRESETS,
    compare,
    pairs_to_score,
    read_faces,
    score,
)
from gkd.pipeline.embed import split_rows
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.spec import Preprocess, preprocess_preset
from gkd.storage.records.open import open_records
from tests.benchmarks.harness import Bar, report
from tests.paths import SHARED_DATA

SAMPLES = 1_000
RIGHT = preprocess_preset("imagenet")


def main() -> None:
    """Embed, sample, count."""
    records = open_records(SHARED_DATA / "lfw")
    worth = len(pairs_to_score(records.labels, 2 * len(records)))
    labels = records.labels
    firsts = np.flatnonzero((labels[1:] == labels[:-1]) & np.r_[True, labels[1:-1] != labels[:-2]])
    faces, _ = read_faces(records, np.stack([firsts, firsts + 1], 1).ravel(), workers=2)
    embeddings = {}
    for preset in PRESETS:
        embedder = OnnxEmbedder(SHARED_DATA / "teachers" / "mobilefacenet.onnx", preset)
        found = np.concatenate(
            [embedder(faces[b.start : b.stop]) for b in split_rows(range(len(faces)), 64)]
        )
        embeddings[preset] = found / np.linalg.norm(found, axis=1, keepdims=True).astype(np.float64)
    doubted: dict[Preprocess, int] = dict.fromkeys(PRESETS, 0)
    named = dict(doubted)
    for seed in range(SAMPLES):
        pairs = np.random.default_rng(seed).choice(len(firsts), worth, replace=False)
        rows = np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()
        scored = {preset: score(preset, embeddings[preset][rows]) for preset in PRESETS}
        for preset in PRESETS:
            check = compare(scored[preset], list(scored.values()))
            doubted[preset] += check.doubtful
            named[preset] += check.doubtful and check.best.preprocess == RIGHT
    ratios = {}
    bars: dict[str, Bar] = {}
    for preset in PRESETS:
        name = preset.name + " BGR" * preset.bgr
        mean = score(preset, embeddings[preset]).mean
        print(
            f"{name}: d' = {mean:.2f} over all {len(firsts):,} pairs; doubted in "
            f"{doubted[preset]:,} of {SAMPLES:,} samples of {worth}, the right one named in "
            f"{named[preset]:,}",
            file=sys.stderr,
        )
        if preset == RIGHT:
            ratios[f"{name}, the right one, doubted"] = doubted[preset] / SAMPLES
            bars[f"{name}, the right one, doubted"] = ("==", 0.0)
        else:
            ratios[f"{name} noticed, the right one named"] = named[preset] / SAMPLES
            bars[f"{name} noticed, the right one named"] = (">=", 0.99)
    report("calibration", ratios, bars)


if __name__ == "__main__":
    main()
