"""Reads of the LFW pack as ``.rec``, tar shard and Parquet, in order and at random.

    python -m tests.benchmarks.records

The same images are in every form, Parquet with rows in groups of 100 (as hubs publish images) and
of 1,000. Reads are those of ``encoded``, alternating in one run, the best of the rounds; beside
them ``pread`` of the same bytes out of the ``.rec``. Of Parquet's last blocks so few are kept as
hold a hundredth of the images: of a large data set no more stay either. The walk through a tar's
headers is compared with tarfile's, which makes no index of samples and labels.
"""

import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gkd.storage.records import parquet_blocks
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from tests.benchmarks.harness import in_turns, report
from tests.paths import SHARED_DATA
from tests.storage.records.forms import image_column, samples, write_parquet, write_tar

ROUNDS = 5
RANDOM_READS = 20_000
RANDOM_PARQUET_READS = 400
DECODED = 2_000
GROUPS = (100, 1_000)
BARS = {
    "tar, reads at random / .rec": ("<=", 1.5),
    "tar, reads in order / .rec": ("<=", 1.5),
    "tarfile's walk / tar's": (">=", 3.0),
    "Parquet, groups of 100, in order / a JPEG decoded": ("<=", 0.5),
}


def main() -> None:
    """Measure every form and report."""
    records = open_records(SHARED_DATA / "lfw")
    count = len(records)
    in_order = list(range(count))
    at_random = np.random.default_rng(0).integers(0, count, RANDOM_READS).tolist()
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        bodies = [bytes(records.encoded(row)) for row in in_order]
        tar = write_tar(Path(folder) / "lfw.tar", samples(records.labels.tolist(), bodies))
        columns = {"image": image_column(bodies), "label": pa.array(records.labels)}
        parquet = {
            rows: write_parquet(Path(folder) / f"{rows}.parquet", columns, group_rows=rows)
            for rows in GROUPS
        }
        ratios |= walk(tar)
        decode = best(lambda: [records.image(row) for row in at_random[:DECODED]]) / DECODED
        print(f"a JPEG decoded: {decode * 1e6:.1f} us")
        for what, rows in (("in order", in_order), ("at random", at_random)):
            forms = [reads_of_file(rows), reads(records, rows), reads(open_records(tar), rows)]
            each = in_turns(forms, ROUNDS).min(0) / len(rows)
            print(f"{what}: " + ", ".join(f"{seconds * 1e6:.2f} us" for seconds in each))
            ratios[f".rec, reads {what} / pread"] = each[1] / each[0]
            ratios[f"tar, reads {what} / .rec"] = each[2] / each[1]
            parquet_blocks.MAX_BYTES = sum(map(len, bodies)) // 100
            for size, path in parquet.items():
                few = rows if what == "in order" else rows[:RANDOM_PARQUET_READS]
                seconds = best(reads(open_records(path), few)) / len(few)
                print(f"Parquet, groups of {size:,}, {what}: {seconds * 1e6:.1f} us")
                ratios[f"Parquet, groups of {size:,}, {what} / .rec"] = seconds / each[1]
                ratios[f"Parquet, groups of {size:,}, {what} / a JPEG decoded"] = seconds / decode
    report("records", ratios, BARS)


def walk(tar: Path) -> dict[str, float]:
    """Our index of a shard against tarfile's."""

    def theirs() -> None:
        with tarfile.open(tar) as archive:
            assert sum(1 for _ in archive)

    count = len(open_records(tar))
    standard, ours = in_turns([theirs, lambda: open_records(tar)], ROUNDS).min(0).tolist()
    print(
        f"index: {ours / count * 1e6:.1f} s a million samples, tarfile {standard / count * 1e6:.1f}"
    )
    return {"tarfile's walk / tar's": standard / ours}


def reads(records: Records, rows: Sequence[int]) -> Callable[[], object]:
    """Reads of ``rows``."""

    def run() -> None:
        encoded = records.encoded
        for row in rows:
            encoded(row)

    return run


def reads_of_file(rows: Sequence[int]) -> Callable[[], object]:
    """The same bytes by pread from the pack."""
    path = SHARED_DATA / "lfw" / "train.rec"
    records = open_records(path)
    places = [(int(records.sizes[row]), int(records.where(row).rpartition(" ")[2])) for row in rows]

    def run() -> None:
        handle = os.open(path, os.O_RDONLY)
        for size, offset in places:
            os.pread(handle, size, offset)
        os.close(handle)

    return run


def best(run: Callable[[], object]) -> float:
    """Seconds of the best round."""
    return float(in_turns([run], ROUNDS).min())


if __name__ == "__main__":
    main()
