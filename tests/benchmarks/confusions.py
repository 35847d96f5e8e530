"""Wrong labels planted in the LFW pack, and what `gkd targets confusions` finds of them.

    python -m tests.benchmarks.confusions [SEED...]

50 images of identities of four and more have their labels swapped two by two, and five identities
of eight and more are each divided among two labels. The shared teacher with class-mean centres and
the default settings makes the cache; the figures are the worst of the seeds.
"""

import sys
import tempfile
import time
from pathlib import Path

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.storage.analysis.confusions import confusions
from gkd.storage.cache.reader import Cache
from gkd.storage.records.open import open_records
from tests.benchmarks.harness import report
from tests.paths import SHARED_DATA
from tests.planted import RememberingTeacher, figures, plant

SEEDS = (0, 1, 2)
SETTINGS = CacheSettings(partition=PartitionSettings(draws=DRAWS))
SWAPPED, NAMED, SPLIT = (
    "swapped labels among the first 100",
    "of them named after their own identity",
    "lowest rank of a split identity",
)


def main(seeds: tuple[int, ...]) -> None:
    """One cache a seed, from one pass of the teacher."""
    records, teacher = open_records(SHARED_DATA / "lfw"), RememberingTeacher()
    rows = []
    for seed in seeds:
        planted = plant(records, seed)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lfw.gkd"
            cache_teacher(planted.records, out, teacher, CLASS_MEAN, SETTINGS)
            began = time.perf_counter()
            found = confusions(Cache.open(out))
            seconds = time.perf_counter() - began
        rows.append(figures(found, planted) | {"seconds": seconds})
        doubtful = len(found.label_noise)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items())
        print(f"seed {seed}: {shown}; {doubtful} labels in doubt", file=sys.stderr)
    ratios = {
        SWAPPED: min(row[SWAPPED] for row in rows),
        NAMED: min(row[NAMED] for row in rows),
        SPLIT: max(row[SPLIT] for row in rows),
        "seconds to read 10,562 images' groups": max(row["seconds"] for row in rows),
    }
    report("confusions", ratios, {SWAPPED: (">=", 45), NAMED: (">=", 45), SPLIT: ("<=", 20)})


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or SEEDS)
