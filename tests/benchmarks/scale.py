"""A cache of WebFace42M's size: opening it, making it ready, the first batch, joining, memory.

``python -m tests.benchmarks.scale [SAMPLES]`` makes a synthetic cache of 42,474,557 samples with
groups of one or two classes in a temporary folder (about 5 GB with what is materialised, deleted
at the end), and measures each step in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gkd.storage.cache.reader import Cache
from gkd.storage.reading.join import match
from gkd.storage.reading.mmap_store import TargetStore, materialise
from tests.benchmarks.harness import report
from tests.benchmarks.synthetic_cache import make_cache
from tests.paths import ROOT

SAMPLES, CLASSES = 42_474_557, 2_059_906
BATCH, BATCHES = 512, 200
MEGABYTE = 1e6


def own_memory() -> float:
    """Resident memory of this process beyond mapped files, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024 / MEGABYTE


def open_cache(path: Path, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    Cache.open(path)
    return {"seconds": time.perf_counter() - began}


def materialise_cache(path: Path, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    store = materialise(Cache.open(path), folder=folder)
    made = time.perf_counter() - began
    began = time.perf_counter()
    rows = np.random.default_rng(0).integers(0, len(store), BATCH)
    store.lookup(rows, np.zeros(BATCH, bool))
    return {"seconds": made, "first batch": time.perf_counter() - began}


def read(path: Path, folder: Path) -> dict[str, float]:
    """A reader as a training's worker is one: batches all over the cache."""
    began = time.perf_counter()
    store: TargetStore = materialise(Cache.open(path), folder=folder)
    found = time.perf_counter() - began
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(BATCHES):
        store.lookup(rng.integers(0, len(store), BATCH), np.zeros(BATCH, bool))
    return {
        "found again": found,
        "samples a second": BATCH * BATCHES / (time.perf_counter() - began),
        "memory": own_memory(),
    }


def join_copy(path: Path, folder: Path) -> dict[str, float]:
    """Digests and labels of a shuffled copy, matched with the cache's."""
    samples = Cache.open(path).samples()
    order = np.random.default_rng(0).permutation(len(samples))
    digests, labels = samples.digests[order], samples.labels[order]
    began = time.perf_counter()
    places = match(digests, labels, samples.digests, samples.labels)
    seconds = time.perf_counter() - began
    assert np.array_equal(places, order)
    return {"seconds": seconds}


STEPS = {
    "open": open_cache,
    "materialise": materialise_cache,
    "read": read,
    "join": join_copy,
}


def measured(step: str, path: Path, folder: Path) -> dict[str, float]:
    """What a step says that is run in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", step, str(path), str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    print(f"{step}: {result}", file=sys.stderr)
    return result


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "scale.gkd"
        make_cache(
            path,
            num_samples=count,
            num_classes=CLASSES,
            mean_group=1.5,
            max_group=4,
            temperatures=(4.0,),
        )
        opened = measured("open", path, folder)
        made = measured("materialise", path, folder)
        reader = measured("read", path, folder)
        joined = measured("join", path, folder)
    report(
        "scale",
        {
            "open, seconds": opened["seconds"],
            "materialise, seconds": made["seconds"],
            "first batch, seconds": made["first batch"],
            "found again, seconds": reader["found again"],
            "lookup, samples a second": reader["samples a second"],
            "memory of a reader beyond mapped files, MB": reader["memory"],
            "match all digests, seconds": joined["seconds"],
        },
        {
            "open, seconds": ("<=", 2.0),
            "memory of a reader beyond mapped files, MB": ("<=", 200.0),
        },
    )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(STEPS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else SAMPLES)
