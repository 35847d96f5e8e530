"""Small records, a deterministic teacher and caches of both."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from PIL import Image

from gkd.pipeline.centers.load import CLASS_MEAN, Centers
from gkd.pipeline.ranks import Ranks
from gkd.pipeline.run import CacheSummary, cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.storage.util.torch_device import Precision
from tests.storage.records.packs import payload, write_pack

EMBEDDING_DIM = 16
SETTINGS = CacheSettings(
    partition=PartitionSettings(group_temperature=1.0, max_group=8),
    batch_size=4,
    shard_samples=10,
)


class PixelEmbedder(Embedder):
    """A fixed random projection of coarse pixels; ``seconds`` slow a batch down."""

    name = "pixels"
    arch = "projection"
    sha256 = "0" * 64
    embedding_dim = EMBEDDING_DIM
    preprocess = preprocess_preset("arcface")
    precision: Precision = "float32"
    compiled = False
    device = "cpu"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.images = 0
        self._matrix = np.random.default_rng(0).normal(size=(7 * 7 * 3, EMBEDDING_DIM))

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        time.sleep(self.seconds)
        self.images += len(images)
        coarse = images[:, ::16, ::16].reshape(len(images), -1) / 127.5 - 1
        return np.stack([row @ self._matrix for row in coarse]).astype(np.float32)


def write_folder(folder: Path, identities: int = 7, images: int = 5, seed: int = 0) -> Path:
    """An image folder of noise, alike within an identity."""
    rng = np.random.default_rng(seed)
    for identity in range(identities):
        base = rng.integers(0, 256, (7, 7, 3))
        (folder / f"id{identity}").mkdir(parents=True)
        for image in range(images):
            pixels = np.clip(base + rng.integers(-60, 60, (7, 7, 3)), 0, 255).astype(np.uint8)
            face = Image.fromarray(pixels).resize((112, 112), Image.Resampling.NEAREST)
            face.save(folder / f"id{identity}" / f"{image}.png")
    return folder


def records_of(labels: npt.NDArray[np.int64], path: Path) -> Records:
    """Records with these labels and no readable image."""
    blank = {key: payload(float(label), b"", key) for key, label in enumerate(labels, 1)}
    return open_records(write_pack(path, blank, classes=int(labels.max()) + 1).parent)


def centers(num_classes: int) -> Centers:
    """Random unit centres."""
    array = np.random.default_rng(1).normal(size=(num_classes, EMBEDDING_DIM))
    array /= np.linalg.norm(array, axis=1, keepdims=True)
    return Centers(array.astype(np.float32), "file", "random.npy")


def make(
    folder: Path,
    out: Path,
    *,
    class_mean: bool = False,
    embedder: PixelEmbedder | None = None,
    settings: CacheSettings = SETTINGS,
    ranks: Ranks | None = None,
) -> CacheSummary:
    """A cache of an image folder."""
    records = open_records(folder)
    return cache_teacher(
        records,
        out,
        embedder or PixelEmbedder(),
        CLASS_MEAN if class_mean else centers(records.num_classes),
        settings,
        ranks=ranks,
    )


def ranks_of(world_size: int) -> list[Ranks]:
    """The ranks of one run, for threads of this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [Ranks(rank, world_size, store, "run") for rank in range(world_size)]


def make_by_ranks(folder: Path, out: Path, world_size: int, **options: Any) -> None:
    """A cache of an image folder, by ranks that are threads of this process."""
    with ThreadPoolExecutor(world_size) as pool:
        done = [pool.submit(make, folder, out, ranks=r, **options) for r in ranks_of(world_size)]
    for rank in done:
        rank.result()


def failing(after: int) -> Callable[..., None]:
    """The writing of shards to a disk that is gone ``after`` so many of them."""
    write = CacheWriter.write_shard
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError("the disk is gone")
        write(*args, **kwargs)

    return fail


def make_slowly(folder: Path, out: Path, mode: str = CLASS_MEAN) -> None:
    """A cache for which every batch takes a while."""
    make(folder, out, class_mean=mode == CLASS_MEAN, embedder=PixelEmbedder(seconds=0.2))
