"""Kills processes that make a cache at random times and starts others, until it is finished.

Processes are forked from one that has imported everything, so a round takes little more than the
work itself. From another process:

python -c "from tests.pipeline.rounds import main; main()" FOLDER WORK KILLS SEED
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from gkd.pipeline import ranks
from gkd.pipeline.settings import CacheSettings
from gkd.storage.cache import layout
from gkd.storage.errors import IncompleteCacheError
from gkd.storage.util import rendezvous
from tests.pipeline.faces import SETTINGS, PixelEmbedder, make

SHARD_SAMPLES = 3
BATCH_SECONDS = 0.01
ARRIVAL = timedelta(seconds=3)  # a rank may be killed before it arrives
SILENT_SECONDS = 1.0
MAX_RANKS = 3
LEFT_ALONE = 3  # exit code of a rank that noticed that another had ended
KILLED = -9
MAX_SECONDS = 120.0


@dataclass(frozen=True)
class Tally:
    """What was done: ``worlds`` are the numbers of ranks of each round with a kill."""

    kills: int
    worlds: list[int]
    caches: int
    resumed: int
    wrong: list[str]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a cache, its centres, and whatever else is beside it."""
    return {str(p.relative_to(out.parent)): p.read_bytes() for p in files_beside(out)}


def files_beside(out: Path) -> list[Path]:
    """All files in the folder that holds a cache."""
    return sorted(p for p in out.parent.rglob("*") if p.is_file())


def kill_and_resume(folder: Path, work: Path, *, kills: int, seed: int) -> Tally:
    """Make caches of ``folder`` under ``work`` until processes were killed in ``kills`` rounds.

    Each round has another number of ranks, and all of them or one at random are killed after a
    random time. Every cache is made to its end and compared with one that was never interrupted.
    """
    rng = np.random.default_rng(seed)
    unbroken: dict[bool, dict[str, bytes]] = {}
    seconds: dict[bool, float] = {}
    finish(start(folder, work / "warm-up" / "faces.gkd", 1, False))
    for class_mean in (False, True):
        out = work / f"unbroken-{class_mean}" / "faces.gkd"
        began = time.monotonic()
        if finish(start(folder, out, 1, class_mean)) != [0]:
            raise RuntimeError(f"the unbroken run failed, see {out.parent}.log")
        seconds[class_mean] = time.monotonic() - began
        unbroken[class_mean] = contents(out)

    worlds: list[int] = []
    wrong: list[str] = []
    caches = resumed = 0
    while len(worlds) < kills:
        class_mean = bool(caches % 2)
        out = work / f"{caches}" / "faces.gkd"
        before, world_size = len(worlds), 0
        while not (out / layout.MANIFEST).exists():
            world_size = int(rng.choice([n for n in range(1, MAX_RANKS + 1) if n != world_size]))
            processes = start(folder, out, world_size, class_mean)
            if len(worlds) < kills:
                time.sleep(rng.uniform(0, 0.8 * seconds[class_mean]))
                victims = processes if rng.random() < 0.5 else [processes[rng.integers(world_size)]]
                for process in victims:
                    process.kill()
            codes = finish(processes)
            if KILLED in codes:
                worlds.append(world_size)
            if not set(codes) <= {0, LEFT_ALONE, KILLED}:
                wrong.append(f"{out}: exit codes {codes}, see {out.parent}.log")
                return Tally(len(worlds), worlds, caches, resumed, wrong)
        # A rank may be killed after the cache is finished; the next run cleans up after it.
        finish(start(folder, out, 1, class_mean))
        caches += 1
        resumed += len(worlds) > before
        if contents(out) != unbroken[class_mean]:
            wrong.append(f"{out}: {_difference(contents(out), unbroken[class_mean])}")
    return Tally(len(worlds), worlds, caches, resumed, wrong)


def start(folder: Path, out: Path, world_size: int, class_mean: bool) -> list[BaseProcess]:
    """All ranks of one run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(target=write, args=(folder, out, rank, world_size, port, class_mean))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes, once all have ended or were killed."""
    for process in processes:
        process.join(MAX_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def free_port() -> int:
    """A port of this machine at which ranks can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def write(folder: Path, out: Path, rank: int, world_size: int, port: int, class_mean: bool) -> None:
    """One rank's part; what it prints goes to a file beside the cache's folder."""
    log = os.open(f"{out.parent}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world_size}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    rendezvous.ARRIVAL = ARRIVAL
    ranks.BEAT_SECONDS, ranks.POLL_SECONDS = 0.1, 0.02
    ranks.SILENT_SECONDS = SILENT_SECONDS
    settings = CacheSettings(
        partition=SETTINGS.partition, batch_size=1, workers=1, shard_samples=SHARD_SAMPLES
    )
    try:
        make(
            folder,
            out,
            class_mean=class_mean,
            embedder=PixelEmbedder(BATCH_SECONDS),
            settings=settings,
        )
    except (IncompleteCacheError, SystemExit):
        os._exit(LEFT_ALONE)


def _difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return ", ".join(names)


def main() -> None:
    """Do rounds and print the tally as JSON."""
    folder, work, kills, seed = sys.argv[1:]
    tally = kill_and_resume(Path(folder), Path(work), kills=int(kills), seed=int(seed))
    print(json.dumps(asdict(tally)))
