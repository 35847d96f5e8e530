"""Ranks that wait for each other, of which some fail, die or never arrive."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gkd.pipeline import ranks as module
from gkd.pipeline.ranks import Ranks, joined_ranks
from gkd.storage.errors import ConfigError, IncompleteCacheError
from gkd.storage.util import rendezvous
from tests.pipeline.faces import ranks_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def tcp_store(port: int, *, holds: bool) -> Any:
    """A connection to the store at a port, which this process may hold itself."""
    patience = timedelta(seconds=5)
    return dist.TCPStore(  # type: ignore[attr-defined]
        "localhost", port, is_master=holds, wait_for_workers=False, timeout=patience
    )


def test_a_rank_alone_does_the_work_itself() -> None:
    done: list[str] = []
    with joined_ranks() as ranks:
        ranks.once("step", lambda: done.append("step"))
        ranks.check()
    assert (ranks.rank, ranks.world_size, done) == (0, 1, ["step"])


def test_the_first_works_once_all_have_come_and_the_others_see_it_done() -> None:
    events: list[str] = []

    def run(ranks: Ranks) -> None:
        with ranks:
            for step in ("a", "b"):
                time.sleep(0.05 * ranks.rank)
                events.append(f"{step} reached")
                ranks.once(step, lambda step=step: events.append(f"{step} done"))  # type: ignore[misc]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, ranks_of(3)))
    for step in ("a", "b"):
        done = events.index(f"{step} done")
        assert [event for event in events[:done] if event == f"{step} reached"] == [
            f"{step} reached"
        ] * 3
    assert events.count("a done") == events.count("b done") == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_rank_ends_the_others_without_another_message(failing: int) -> None:
    def run(ranks: Ranks) -> None:
        with ranks:
            if ranks.rank == failing:
                raise OSError("the disk is gone")
            ranks.once("step", lambda: None)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(run, ranks) for ranks in ranks_of(3)]
    errors = [rank.exception() for rank in running]
    assert [type(error) for error in errors] == [
        OSError if rank == failing else SystemExit for rank in range(3)
    ]
    assert [error.code for error in errors if isinstance(error, SystemExit)] == [1, 1]


def test_a_rank_that_dies_is_missed_after_a_while_however_late_it_is_waited_for() -> None:
    first, second, dead = ranks_of(3)

    def run(ranks: Ranks) -> None:
        with ranks:
            ranks.once("step", lambda: None)

    # The second is slow but alive: it beats for longer than a dead rank may be silent.
    with ThreadPoolExecutor(2) as pool, second:
        waiting = pool.submit(run, first)
        error = waiting.exception()
        with pytest.raises(SystemExit):
            second.once("step", lambda: None)
    assert isinstance(error, IncompleteCacheError)
    assert "rank 2 of 3 ended before the cache was finished" in str(error)
    assert "run the same command again, with any number of ranks, to resume" in str(error)
    assert dead.rank == 2


def test_the_end_of_the_process_that_held_the_store_is_noticed() -> None:
    server = tcp_store(0, holds=True)
    client = tcp_store(server.port, holds=False)
    with Ranks(1, 2, client) as ranks:
        ranks.check()
        del server
        with pytest.raises(IncompleteCacheError, match="rank 0 of 2 ended before"):
            ranks.once("step", lambda: None)


def test_a_rank_that_never_arrives_is_not_waited_for_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "ARRIVAL", timedelta(seconds=1))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"variable MASTER_ADDR .*start all ranks with torchrun"):
        joined_ranks().__enter__()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    closed = tcp_store(0, holds=True)
    monkeypatch.setenv("MASTER_PORT", str(closed.port))
    del closed
    with pytest.raises(ConfigError, match="rank 0 of WORLD_SIZE=2 did not arrive at localhost:"):
        joined_ranks().__enter__()


def test_the_heartbeat_ends_with_the_run() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with Ranks(0, 1, store):
        while not store.add("beats/0", 0):
            time.sleep(0.01)
    count = store.add("beats/0", 0)
    time.sleep(0.2)
    assert store.add("beats/0", 0) == count
