"""The shared memory that data workers need, against what there is."""

import math
import os
import shutil
import sys
from pathlib import Path

from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.images import FACE_SHAPE
from gkd.storage.util.torchrun_env import local_world_size
from gkd.trainer.config import Signal
from gkd.trainer.data.dataset import JoinedTargets, chosen_signal

FOLDER = Path("/dev/shm")
# Batches that a worker makes ahead, where there is room.
PREFETCH = 4
# Beside those: one on its way, one in training, one not freed yet.
_IN_HAND = 3
_ENTRY_BYTES = 16  # class, probability and weight
MORE = (
    "give it more (docker run --shm-size=1g, a Kubernetes emptyDir of medium Memory, or "
    f"mount -o remount,size=1g {FOLDER})"
)


def needed(workers: int, prefetch: int, batch: int) -> int:
    """Bytes for ``workers`` that each make ``prefetch`` batches of ``batch`` bytes ahead."""
    return (workers * prefetch + _IN_HAND) * batch if workers else 0


def batch_bytes(rows: int, targets: JoinedTargets | None, signal: Signal) -> int:
    """Bytes of a batch of ``rows`` images with their targets, about; groups vary in size."""
    entries = 0.0
    if targets is not None:
        spec, store = targets.spec, targets.store
        kind = chosen_signal(signal, spec)
        if kind != "group" and spec.draws is not None:
            entries += spec.draws.count
        if kind != "draws":
            if isinstance(store, ShardStore):
                assert store.cache.manifest is not None
                stored = sum(store.cache.manifest.entries.values())
            else:
                stored = store.shapes()["indices"][1][0]
            entries += 1.5 * stored / (spec.num_samples * len(spec.views))
    return int(rows * (math.prod(FACE_SHAPE) + entries * _ENTRY_BYTES + 64))


def free_bytes(folder: Path = FOLDER) -> int:
    """What this rank may take of the node's shared memory: 0 if it cannot be written."""
    if not sys.platform.startswith("linux"):  # it is not a folder there
        return sys.maxsize
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return 0
    return int(shutil.disk_usage(folder).free * 0.9) // local_world_size()


def fit(workers: int, batch: int, free: int) -> tuple[int, int, str]:
    """Workers and batches ahead for each that ``free`` bytes have room for, and what to say.

    As many workers as possible, then as many batches ahead; no workers if there is room for none.
    Nothing is to be said if all have room.
    """
    wanted = needed(workers, PREFETCH, batch)
    if wanted <= free:
        return workers, PREFETCH, ""
    there = (
        f"{FOLDER} has {free / 2**20:,.0f} MiB for this rank, and {workers} data workers that "
        f"make {PREFETCH} batches of {batch / 2**20:,.1f} MiB ahead need {wanted / 2**20:,.0f} MiB"
    )
    for fewer in range(workers, 0, -1):
        for ahead in range(PREFETCH, 0, -1):
            if needed(fewer, ahead, batch) <= free:
                used = f"training with {fewer} worker{'s' * (fewer > 1)}, {ahead} ahead each"
                return fewer, ahead, f"{there}: {used}; for all of them, {MORE}"
    return 0, 0, f"{there}: the training process decodes images itself; to use workers, {MORE}"
