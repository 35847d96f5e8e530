"""Makes the golden cache of format 1: ``python -m tests.golden.make FOLDER``.

It writes FOLDER/format1.gkd, and FOLDER/format1.json with every value written out. Both are
committed and never change: every later version must read that cache. The values come from formulas,
so that they do not depend on a random number generator. The bytes of the tables of samples, and
with them the id, depend on the version of pyarrow.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import (
    VIEWS,
    CacheSpec,
    CentersSpec,
    DatasetSpec,
    DerivedSpec,
    DrawsSpec,
    TeacherSpec,
    View,
    preprocess_preset,
)
from gkd.storage.cache.targets import Draws, SparseTargets, offsets_from_sizes
from gkd.storage.cache.writer import CacheWriter

SKIPPED = {5: "expected 112x112 pixels, got 64x64"}
ALL_MASS, NO_MASS = 8, 9
CARD = "# Golden cache of format 1\n\nMade by tests/golden/make.py, of no images at all.\n"
SPEC = CacheSpec(
    num_samples=10,
    num_classes=2**32,
    shard_samples=4,
    max_group=7,
    threshold=0.9,
    group_temperature=2.0,
    temperatures=(1.0, 2.0, 4.0),
    scale=64.0,
    margin=0.4,
    views=VIEWS,
    preprocess=preprocess_preset("imagenet", bgr=True),
    precision="float32",
    teacher=TeacherSpec("golden.onnx", "onnx", "1" * 64, 128),
    centers=CentersSpec("class-mean", "golden.centers.npy", "2" * 64),
    dataset=DatasetSpec("golden", 10, 2**32, "natural", "3" * 64),
    draws=DrawsSpec(2, 4.0, "all"),
    derived=DerivedSpec("merge", ("4" * 64, "5" * 64)),
    software={"gkd": "0.1.0"},
)


def group(row: int, view: View) -> tuple[list[int], list[int]]:
    """Classes and codes of one sample: sizes 1 to 7, the largest class, the largest code."""
    size = 0 if row in SKIPPED else 1 + (3 * row + VIEWS.index(view)) % 7
    classes = [label(row), 2**32 - 1, *((7919 * (row + 1) * k) % 10**6 + 20 for k in range(1, 6))]
    codes = [1024, 2048, 3072, 4096 + row, 30000, 65534, 65535]
    if row == ALL_MASS:
        codes = [0, 40000, 50000, 65000, 65534, 65535]
    if row == NO_MASS:
        codes = [65535] * 7
    return classes[:size], codes[:size]


def label(row: int) -> int:
    return row % 3


def secondary(row: int, view: View) -> list[float]:
    """What the group leaves at its temperature, between two negative eighths."""
    if row in SKIPPED or row == NO_MASS:
        return [0.0, 0.0, 0.0]
    if row == ALL_MASS:
        return [-np.inf, -np.inf, -np.inf]
    _, codes = group(row, view)
    left = 1 - sum(2 ** (-code / 1024) for code in codes)
    return [-(8 * row + 9) / 8, math.log(left), -(VIEWS.index(view) + 1) / 8]


def digest(row: int) -> bytes:
    return hashlib.blake2b(b"golden %d" % row, digest_size=16).digest()


def key(row: int) -> str:
    return f"1/Zoë {row % 3}/{row:04d}.jpg"


def targets(rows: range, view: View) -> SparseTargets:
    groups = [group(row, view) for row in rows]
    draws = [[0, 0] if row in SKIPPED else [2**32 - 1, row] for row in rows]
    draw_codes = [[0, 0] if row in SKIPPED else [512 * row, 65535] for row in rows]
    return SparseTargets(
        offsets_from_sizes(np.array([len(classes) for classes, _ in groups])),
        np.array([index for classes, _ in groups for index in classes], np.uint32),
        np.array([code for _, codes in groups for code in codes], np.uint16),
        np.array([secondary(row, view) for row in rows], np.float32),
        Draws(np.array(draws, np.uint32), np.array(draw_codes, np.uint16)),
    )


def values() -> dict[str, Any]:
    """Every value of the cache, sample by sample, as JSON can hold it."""

    def sample(row: int, view: View) -> dict[str, Any]:
        stored = targets(range(row, row + 1), view)
        assert stored.draws is not None
        return {
            "indices": stored.indices.tolist(),
            "log2_probs": stored.log2_probs.tolist(),
            # As text: JSON has no infinity.
            "secondary": [str(mass) for mass in stored.secondary[0].tolist()],
            "draws": stored.draws.classes[0].tolist(),
            "draw_log2_probs": stored.draws.log2_probs[0].tolist(),
        }

    return {
        "samples": [
            {
                "key": key(row),
                "label": label(row),
                "digest": None if row in SKIPPED else digest(row).hex(),
                "skipped": SKIPPED.get(row),
                **{view: sample(row, view) for view in VIEWS},
            }
            for row in range(SPEC.num_samples)
        ]
    }


def make(folder: Path) -> None:
    """Write ``format1.gkd`` and ``format1.json`` into a folder."""
    writer = CacheWriter(folder / "format1.gkd", SPEC)
    for shard in writer.pending():
        rows = SPEC.shard_rows(shard)
        digests = np.frombuffer(b"".join(map(digest, rows)), np.uint8).reshape(-1, 16)
        samples = ShardSamples(
            [key(row) for row in rows],
            np.array([label(row) for row in rows]),
            digests,
            {row - rows.start: why for row, why in SKIPPED.items() if row in rows},
        )
        views: dict[View, SparseTargets] = {view: targets(rows, view) for view in VIEWS}
        truncated: dict[View, int] = {"original": shard, "flipped": 0}
        writer.write_shard(shard, views, samples, truncated=truncated)
    (writer.path / "README.md").write_text(CARD)
    content = {"id": writer.finish(), **values()}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "format1.json").write_text(text + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
