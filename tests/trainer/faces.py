"""A small data set with a teacher's dense logits, its cache, and runs on both."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from gkd.pipeline.settings import PartitionSettings
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import (
    CacheSpec,
    CentersSpec,
    DatasetSpec,
    DrawsSpec,
    TeacherSpec,
    View,
    preprocess_preset,
)
from gkd.storage.cache.targets import Draws, SparseTargets, encode_log_probs
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.records.base import Records
from gkd.storage.records.digests import digests
from gkd.storage.records.open import open_records
from gkd.trainer.config import RunConfig
from gkd.trainer.config_file import load_config
from gkd.trainer.data.dataset import JoinedTargets, join_targets
from gkd.trainer.distributed import ALONE, Ranks, joined_ranks
from gkd.trainer.evaluation.bin_file import write_verification_set
from gkd.trainer.loop import Summary, train
from tests.pipeline.given_logits import partition_logits
from tests.reference import log_softmax

IDENTITIES, IMAGES_EACH = 6, 7
SETTINGS = PartitionSettings(group_temperature=4.0, temperatures=(1.0, 4.0))
SMALL = (
    "student.name=iresnet18",
    "student.width=0.125",
    "student.input_size=28",
    "student.embedding_dim=8",
    "data.workers=0",
    "train.batch_size=8",
    "train.epochs=3",
    "train.log_every=1",
    "schedule.warmup_epochs=0.5",
)


def small_config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def make(folder: Path, *, views: Sequence[View] = ("original", "flipped")) -> None:
    """Write ``folder``/faces, ``folder``/targets.gkd and ``folder``/pairs.bin."""
    rng = np.random.default_rng(3)
    encoded = []
    for identity in range(IDENTITIES):
        home = folder / "faces" / f"person_{identity}"
        home.mkdir(parents=True)
        base = rng.integers(0, 256, (4, 4, 3))
        for image in range(IMAGES_EACH):
            coarse = np.clip(base + rng.normal(0, 25, base.shape), 0, 255).astype(np.uint8)
            jpeg = simplejpeg.encode_jpeg(coarse.repeat(28, 0).repeat(28, 1), quality=90)
            (home / f"{image}.jpg").write_bytes(jpeg)
            encoded.append(jpeg)
    write_cache(folder / "targets.gkd", open_records(folder / "faces"), views)
    pairs = rng.integers(0, len(encoded), (40, 2))
    issame = pairs[:, 0] // IMAGES_EACH == pairs[:, 1] // IMAGES_EACH
    images = [encoded[place] for place in pairs.ravel()]
    write_verification_set(folder / "pairs.bin", images, issame)


def teacher_logits(records: Records, view: View) -> npt.NDArray[np.float32]:
    """The dense teacher: logits [N, C], margin and scale applied."""
    rng = np.random.default_rng([5, view == "flipped"])
    logits = rng.normal(0, 8, (len(records), records.num_classes))
    logits[np.arange(len(records)), records.labels] += 10
    return logits.astype(np.float32)


def draw(
    logits: npt.NDArray[np.float32], draws: DrawsSpec, seed: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    """Classes drawn from dense logits [n, C] by numpy, and the codes of their probabilities."""
    log_probs = log_softmax(logits.astype(np.float64) / draws.temperature)
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(len(row), draws.count, p=np.exp(row)) for row in log_probs]
    classes = np.stack(chosen).astype(np.uint32)
    return classes, encode_log_probs(np.take_along_axis(log_probs, classes.astype(int), 1))


def write_cache(
    path: Path, records: Records, views: Sequence[View], draws: DrawsSpec | None = None
) -> None:
    spec = CacheSpec(
        num_samples=len(records),
        num_classes=records.num_classes,
        shard_samples=16,
        max_group=records.num_classes,
        threshold=SETTINGS.threshold,
        group_temperature=SETTINGS.group_temperature,
        temperatures=SETTINGS.temperatures,
        scale=SETTINGS.scale,
        margin=SETTINGS.margin,
        views=tuple(views),
        preprocess=preprocess_preset("arcface"),
        precision="float32",
        teacher=TeacherSpec("none", "none", "0" * 64, 8),
        centers=CentersSpec("file", "none", "0" * 64),
        dataset=DatasetSpec(
            records.name,
            len(records),
            records.num_classes,
            records.label_order,
            records.fingerprint,
        ),
        draws=draws,
        software={},
    )
    writer = CacheWriter(path, spec)
    seen = digests(records, workers=1)
    logits = {view: torch.from_numpy(teacher_logits(records, view)) for view in views}
    for shard in writer.pending():
        rows = spec.shard_rows(shard)
        place = slice(rows.start, rows.stop)
        labels = records.labels[place]
        targets: dict[View, SparseTargets] = {}
        for view in views:
            given = logits[view][place], torch.from_numpy(labels)
            targets[view] = partition_logits(*given, SETTINGS).targets
            if draws is not None:
                drawn, codes = draw(given[0].numpy(), draws, shard)
                targets[view] = replace(targets[view], draws=Draws(drawn, codes))
        samples = ShardSamples([records.key(row) for row in rows], labels, seen[place], {})
        writer.write_shard(shard, targets, samples, truncated=dict.fromkeys(views, 0))
    writer.finish()


def load(folder: Path) -> tuple[Records, JoinedTargets]:
    records = open_records(folder / "faces")
    cache = Cache.open(folder / "targets.gkd")
    return join_targets(records, cache, workers=1, folder=folder / "materialised")


def run(folder: Path, out: Path, *overrides: str, ranks: Ranks = ALONE) -> Summary:
    records, targets = load(folder)
    config, command = small_config(*overrides), ["gkd", "test"]
    return train(config, records, targets, out, command=command, ranks=ranks)


def run_process(folder: Path, out: Path, *overrides: str) -> None:
    """A run as the process itself: alone, or as the rank that its environment names."""
    torch.set_num_threads(1)
    with joined_ranks("cpu") as joined:
        run(folder, out, *overrides, ranks=joined)


if __name__ == "__main__":  # python -m tests.trainer.faces FOLDER OUT [section.key=value]...
    run_process(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
