"""Runs of several ranks, and runs that are killed, interrupted or fail, end in the same bytes."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from gkd.pipeline.centers.means import centers_path
from gkd.pipeline.checks.calibration import MIN_IMAGES
from gkd.pipeline.embedding_store import work_path
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, DrawsSpec
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.util.lock import WriteLock
from tests.pipeline.faces import (
    SETTINGS,
    PixelEmbedder,
    failing,
    make,
    make_by_ranks,
    make_slowly,
    ranks_of,
    write_folder,
)
from tests.processes import Process, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "cache.gkd"
    make(folder, out, class_mean=True)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a cache and its centres."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if centers_path(out).exists():
        files["centers"] = centers_path(out).read_bytes()
    return files


def test_a_finished_cache_is_not_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    first = make(folder, out, class_mean=True)
    before = contents(out)
    embedder = PixelEmbedder()
    again = make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images == 0
    assert again.cache_id == first.cache_id
    assert contents(out) == before


def test_three_ranks_write_what_one_process_writes(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "cache.gkd"
    make_by_ranks(folder, out, 3, class_mean=True)
    assert contents(out) == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.centers.npy", "cache.gkd"]


def test_a_rank_that_fails_ends_the_others_and_any_number_of_ranks_resumes(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    class Failing(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            raise RuntimeError("out of memory")

    out = tmp_path / "cache.gkd"
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(make, folder, out, class_mean=True, embedder=embedder, ranks=ranks)
            for ranks, embedder in zip(ranks_of(2), (PixelEmbedder(), Failing()), strict=True)
        )
    assert isinstance(first.exception(), SystemExit)
    assert str(second.exception()) == "out of memory"
    assert not out.exists()
    make_by_ranks(folder, out, 3, class_mean=True)
    assert contents(out) == unbroken


def test_a_second_run_on_the_same_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    with WriteLock(out):
        with pytest.raises(ConfigError, match=f"another run is writing it: process {os.getpid()}"):
            make(folder, out)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(make, folder, out, ranks=ranks) for ranks in ranks_of(2)]
    assert [type(rank.exception()) for rank in running] == [ConfigError, SystemExit]
    assert not out.exists()


@pytest.mark.parametrize("source", ["all", "primary"])
def test_draws_do_not_depend_on_batches_ranks_or_interruptions(
    folder: Path, tmp_path: Path, source: Literal["all", "primary"]
) -> None:
    draws = DrawsSpec(16, 4.0, source, seed=3)
    settings = replace(SETTINGS, partition=replace(SETTINGS.partition, draws=draws))
    complete = tmp_path / "complete.gkd"
    make(folder, complete, settings=settings)
    assert not verify(complete).faults

    batches = tmp_path / "batches.gkd"
    make(folder, batches, settings=replace(settings, batch_size=7))
    found, expected = contents(batches), contents(complete)
    drawn = [name for name in expected if "/draws/" in name or "/draw_log2_probs/" in name]
    assert len(drawn) == 2 * 2 * (1 + 4)
    assert {name: found[name] for name in drawn} == {name: expected[name] for name in drawn}

    # The second half of a run, of one rank and of two that come after it.
    halves = tmp_path / "halves.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(1))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, halves, settings=settings)
    make_by_ranks(folder, halves, 2, settings=settings)
    assert contents(halves) == contents(complete)

    original, flipped = (Cache.open(complete).read_shard(0, view).draws for view in VIEWS)
    assert original is not None
    assert flipped is not None
    assert not np.array_equal(original.classes, flipped.classes)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_teacher_pass_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes], how: signal.Signals
) -> None:
    out = tmp_path / "cache.gkd"
    with running(make_slowly, folder, out) as process:
        wait_for(work_path(out) / "000000.npz", process)
        process.send_signal(how)
        assert process.wait() in (1, -how)
    assert not out.exists()
    embedder = PixelEmbedder()
    make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images < 2 * 35, "what was kept is not computed again"
    assert contents(out) == unbroken


def test_a_killed_run_resumes_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.gkd"
    with running(make_slowly, folder, out, "file") as process:
        wait_for(out / "commits" / "000000.json", process)
    assert not (out / "manifest.json").exists()
    embedder = PixelEmbedder()
    make(folder, out, embedder=embedder)
    assert embedder.images < 2 * 35
    complete = tmp_path / "complete.gkd"
    make(folder, complete)
    assert contents(out) == contents(complete)


def test_a_partition_pass_resumes_from_kept_embeddings(
    folder: Path, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    out = tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(2))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=True)
    assert sorted(p.name for p in (out / "commits").iterdir()) == ["000000.json", "000001.json"]
    embedder = PixelEmbedder()
    make(folder, out, class_mean=True, embedder=embedder)
    assert embedder.images == 0
    assert contents(out) == unbroken


@pytest.mark.parametrize("class_mean", [False, True])
def test_a_run_does_not_resume_with_other_images_of_the_same_size(
    tmp_path: Path, class_mean: bool
) -> None:
    folder, out = write_folder(tmp_path / "set"), tmp_path / "cache.gkd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", failing(2))
        with pytest.raises(OSError, match="the disk is gone"):
            make(folder, out, class_mean=class_mean)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    for path, content in before.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    written = work_path(out) if class_mean else out
    with pytest.raises(
        SpecMismatchError, match=rf"id0/0\.png: expected the image that {written} was begun with"
    ):
        make(folder, out, class_mean=class_mean)
    for path, content in before.items():
        path.write_bytes(content)
    make(folder, out, class_mean=class_mean)
    assert not verify(out).faults


def wait_for(path: Path, process: Process) -> None:
    while not path.exists():
        assert process.poll() is None, process.err
        time.sleep(0.02)


def test_an_interrupt_passes_through_and_leaves_complete_shards(
    folder: Path, tmp_path: Path
) -> None:
    class Interrupted(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            if self.images >= MIN_IMAGES + 50:  # after the sample of the calibration
                raise KeyboardInterrupt
            return super().__call__(images)

    out = tmp_path / "cache.gkd"
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, embedder=Interrupted())
    assert [p.name for p in sorted((out / "commits").iterdir())] == ["000000.json", "000001.json"]
    make(folder, out)
    complete = tmp_path / "complete.gkd"
    make(folder, complete)
    assert contents(out) == contents(complete)


def test_a_failing_writer_thread_ends_the_run_with_its_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheWriter, "write_shard", failing(0))
    with pytest.raises(OSError, match="the disk is gone"):
        make(folder, tmp_path / "cache.gkd")


def test_a_failing_teacher_ends_the_run_with_its_error(folder: Path, tmp_path: Path) -> None:
    class Failing(PixelEmbedder):
        def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make(folder, tmp_path / "cache.gkd", embedder=Failing())
