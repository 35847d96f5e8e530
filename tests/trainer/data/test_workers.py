"""Data workers that fail: each failure ends the training with a word, wherever it happens."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gkd.storage.errors import GkdError
from gkd.trainer.data import loader, shared_memory
from gkd.trainer.data.dataset import FaceBatches
from gkd.trainer.data.loader import BatchLoader, _Packed
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.data.shared_memory import batch_bytes, fit, free_bytes, needed
from tests.trainer.faces import load

SAMPLER = BatchSampler(num_images=42, batch_size=8, epochs=3, seed=1, flip=True)


@pytest.fixture
def batches(faces: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BatchLoader]:
    """Makes the batches of one worker that does something before each."""
    monkeypatch.setattr(loader, "_END_SECONDS", 0.2)
    records, targets = load(faces)

    def make(before: Callable[[], object], workers: int = 1) -> BatchLoader:
        original = FaceBatches.__getitem__

        def get(self: FaceBatches, indices: Any) -> Any:
            before()
            return original(self, indices)

        monkeypatch.setattr(FaceBatches, "__getitem__", get)
        dataset = FaceBatches(records, targets, temperature=4.0)
        return BatchLoader(dataset, SAMPLER, workers=workers, pin=False)

    return make


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, "often memory ran out"),
        (signal.SIGBUS, "a file that it had mapped was cut"),
        (signal.SIGSEGV, "native code crashed"),
    ],
)
def test_a_workers_death_is_told_by_its_signal(
    number: signal.Signals,
    why: str,
    batches: Callable[..., BatchLoader],
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = batches(lambda: os.kill(os.getpid(), number))
    with pytest.raises(RuntimeError):
        next(made)
    assert re.search(rf"process \d+ \({number.name}\); {why}", made.dead_workers())
    assert "shared memory" not in made.dead_workers() + capfd.readouterr().err


def test_a_batch_that_cannot_be_sent_ends_its_worker(
    batches: Callable[..., BatchLoader],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Pickled by a thread of the worker, where torch drops it and waits for ever."""

    def refuse(_self: object) -> str:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(_Packed, "__reduce__", refuse)
    made = batches(lambda: None)
    with pytest.raises(RuntimeError):
        next(made)
    assert "could not send a batch, for the reason that it printed above" in made.dead_workers()
    assert "cannot send a batch: AF_UNIX path too long" in capfd.readouterr().err


def test_full_shared_memory_is_told(batches: Callable[..., BatchLoader]) -> None:
    made = batches(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    with pytest.raises(GkdError, match=r"finds no room in shared memory .*--shm-size"):
        next(made)


def test_a_worker_that_hangs_is_named(
    batches: Callable[..., BatchLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "STUCK_SECONDS", 0.5)
    made = batches(lambda: time.sleep(300))
    (worker,) = made._items._workers  # type: ignore[attr-defined]
    with pytest.raises(GkdError, match=rf"process {worker.pid}, which prepares data, has not deli"):
        next(made)
    assert not psutil.pid_exists(worker.pid)


def test_a_hanging_worker_does_not_delay_a_stop(batches: Callable[..., BatchLoader]) -> None:
    made = batches(lambda: time.sleep(300))
    assert made.take(lambda: True) is None
    made.close()


def test_workers_that_cannot_start_are_told(
    batches: Callable[..., BatchLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(GkdError, match=r"1 processes cannot be started .* set data\.workers=0"):
        batches(lambda: None)


def test_workers_are_as_many_as_shared_memory_has_room_for() -> None:
    batch = 10_000_000
    assert fit(4, batch, needed(4, 4, batch)) == (4, 4, "")
    for free in (0, 5, 6, 7, 10, 15, 18):
        workers, ahead, said = fit(4, batch, free * batch)
        assert needed(workers, ahead, batch) <= free * batch
        assert "/dev/shm has " in said
        assert (f"with {workers} worker" in said) == bool(workers)
        if free:  # one more would have no room
            assert workers == 4 or needed(workers + 1, 1, batch) > free * batch
    assert fit(0, batch, 0) == (0, 4, "")


def test_without_room_the_training_process_makes_the_batches(
    batches: Callable[..., BatchLoader],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda: 1000)
    assert len(list(batches(lambda: None, workers=2))) == 15
    assert "the training process decodes images itself" in capsys.readouterr().err


def test_the_bytes_of_a_batch_are_about_those_that_are_sent(faces: Path) -> None:
    records, targets = load(faces)
    dataset = FaceBatches(records, targets, temperature=4.0)
    packed = [_Packed.pack(dataset[indices]) for indices in list(SAMPLER)[:4]]
    sent = max(item.images.nbytes + item.rest.nbytes for item in packed)
    assert sent <= batch_bytes(8, targets, "auto") < 1.1 * sent


def test_free_shared_memory_is_that_which_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_bytes(tmp_path / "absent") == 0
    alone = free_bytes(tmp_path)
    assert alone > 0
    monkeypatch.setattr(shared_memory, "local_world_size", lambda: 4)
    assert free_bytes(tmp_path) == pytest.approx(alone / 4, rel=0.05)
