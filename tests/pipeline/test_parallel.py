"""Many processes on one cache: killed, interrupted, refused, started again."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from gkd.demo.synthetic import draw_faces
from gkd.pipeline.centers.load import Centers
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.storage.cache import layout
from gkd.storage.cache.metadata import committed_shards
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from gkd.storage.util.lock import WriteLock
from gkd.trainer.backbones import build_backbone
from tests.paths import ROOT
from tests.pipeline.faces import PixelEmbedder, write_folder
from tests.pipeline.rounds import MAX_RANKS, contents
from tests.processes import Process, finished, run_command, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.mark.nightly
def test_ten_rounds_of_kills_give_the_bytes_of_an_unbroken_run(
    folder: Path, tmp_path: Path
) -> None:
    code = "from tests.pipeline.rounds import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path), "10", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert tally["wrong"] == []
    assert tally["kills"] >= 10
    assert set(tally["worlds"]) == set(range(1, MAX_RANKS + 1))
    assert tally["resumed"] >= 2


def rank_process(torchrun: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    """The process of a rank that torchrun has started."""
    (found,) = (
        child
        for child in psutil.Process(torchrun.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )
    return found


def has_more_shards(out: Path, than: int) -> bool:
    return len(committed_shards(out)) > than


def wait_for(done: Callable[[], object], process: "Process | subprocess.Popen[str]") -> None:
    while not done():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A command that makes a cache of 60 shards, without the path of the cache."""
    home = tmp_path_factory.mktemp("home")
    draw_faces(home / "faces", identities=range(20), images_each=6, seed=0, workers=1)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(teacher.state_dict(), home / "teacher.pt")
    options = ("--teacher", home / "teacher.pt", "--centers", "class-mean", "--json")
    sizes = ("--shard-samples", 2, "--batch-size", 2, "--max-group", 8, "--workers", 1)
    return ["cache-teacher", *options, *sizes, home / "faces"]


@pytest.fixture(scope="module")
def expected(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "faces.gkd"
    with running(run_command, *command, out) as process:
        finished([process])
    return contents(out)


def test_torchrun_starts_again_and_finishes_when_a_rank_is_killed(
    command: list[object], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "faces.gkd"
    ranks = ("--nproc-per-node=2", "--standalone", "--max-restarts=1", "-m", "gkd.cli")
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *ranks, *map(str, command), str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: committed_shards(out), process)
        rank_process(process, 1).kill()
        left = len(committed_shards(out))
        assert left < 60
        printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert json.loads(printed)["samples"] == 120, "rank 0 alone prints the result"
    assert contents(out) == expected


def test_interrupts_leave_complete_shards_and_say_how_to_resume(
    command: list[object], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "faces.gkd"
    for sent in (signal.SIGTERM, signal.SIGINT):
        before = len(committed_shards(out))
        with running(run_command, *command, out) as process:
            wait_for(partial(has_more_shards, out, before), process)
            if sent == signal.SIGTERM:
                process.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
                with running(run_command, *command, out) as second:
                    assert second.wait() == 1
                refused = f"{out}: another run is writing it: process {process.pid} on "
                assert second.err.startswith(f"Error: {refused}")
                process.send_signal(signal.SIGCONT)
            process.send_signal(sent)
            assert process.wait() == 1
        assert "run the same command again to resume" in process.err
        assert not WriteLock(out).path.exists()
        assert not (out / layout.MANIFEST).exists()
    with running(run_command, *command, out) as process:
        finished([process])
    assert contents(out) == expected


SHARDS = 18


def test_a_slow_disk_slows_the_teacher_and_memory_stays_flat(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_records(folder)
    records = Subset(one, np.tile(np.arange(len(one)), 2 * SHARDS))
    # Groups as wide as the classes: a shard that is not let go weighs three megabytes.
    records.num_classes = 8000
    partition = PartitionSettings(group_temperature=50.0, threshold=1.0, max_group=8000)
    settings = CacheSettings(
        partition=partition, views=("original",), batch_size=35, workers=2, shard_samples=70
    )
    array = np.random.default_rng(1).normal(size=(8000, 16)).astype(np.float32)
    array /= np.linalg.norm(array, axis=1, keepdims=True)
    embedder = PixelEmbedder()
    embedder.device = "accelerator"  # so that the teacher runs ahead in its own thread
    write = CacheWriter.write_shard
    ahead, memory = [], []

    def write_slowly(writer: CacheWriter, shard: int, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.1)
        write(writer, shard, *args, **kwargs)
        ahead.append(embedder.images - 70 * (shard + 1))
        memory.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(CacheWriter, "write_shard", write_slowly)
    chosen = Centers(array, "file", "random.npy")
    # What numpy and Python hold: of the process's memory the allocator keeps a share of its own.
    tracemalloc.start()
    try:
        cache_teacher(records, tmp_path / "c.gkd", embedder, chosen, settings)
    finally:
        tracemalloc.stop()
    assert len(memory) == SHARDS
    # One shard waits, one is made, and of the embedded batches a bounded queue.
    assert max(ahead) <= 2 * 70 + 10 * 35
    warm, end = np.median(memory[4:8]), np.median(memory[-4:])
    assert end - warm < 5e6, "the 10 shards between them hold 33 MB"
