"""How ranks meet; those of pipeline and trainer join real processes."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.util import rendezvous
from gkd.storage.util.rendezvous import Wait, _common_name, meet, shared_gpu

# Tests of storage alone run without torch.
HashStore = pytest.importorskip("torch.distributed").HashStore


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")


def wait(seconds: float = 60) -> Wait:
    return Wait("here", timedelta(seconds=seconds))


def test_all_ranks_accept_the_name_of_this_start_and_of_no_earlier_one() -> None:
    store = HashStore()
    names = set()
    for _ in range(2):  # the store outlives a restart
        with ThreadPoolExecutor(3) as pool:
            # The last ranks first: they find the name of the start before.
            ranks = [
                pool.submit(_common_name, store, rank, 3, wait(), f"GPU {rank}")
                for rank in (2, 1, 0)
            ]
        ((name, *gpus),) = {(name, *gpus) for name, gpus in (rank.result() for rank in ranks)}
        assert gpus == ["GPU 0", "GPU 1", "GPU 2"]
        names.add(name)
    assert len(names) == 2


def test_a_rank_does_not_wait_for_long_for_an_answer_that_never_comes() -> None:
    store = HashStore()
    store.set("attempt", "of a start whose ranks have died")
    with pytest.raises(ConfigError, match="rank 0 of WORLD_SIZE=3 did not arrive here within"):
        _common_name(store, 1, 3, wait(0.2))


def test_who_waits_says_for_whom_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_FIRST_WORD", 0.1)
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_common_name, store, 1, 3, wait(0.5))
        with pytest.raises(ConfigError, match="rank 2 of WORLD_SIZE=3 did not arrive here"):
            _common_name(store, 0, 3, wait(0.4))
    said = capsys.readouterr().err
    assert "rank 0 of 3 has waited 0 s for rank 2 here, and waits 0:00:00.400000 at most" in said


def test_a_port_that_answers_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER", timedelta(seconds=0.5))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("MASTER_PORT", str(deaf.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"cannot meet at 127.0.0.1:\d+ .*free the port"):
            meet(timedelta(seconds=1))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match=r"cannot meet at 127.0.0.1:\d+ .*free the port"):
            meet(timedelta(seconds=1))


def test_two_ranks_on_one_gpu_are_named() -> None:
    assert shared_gpu(["", "", ""]) == shared_gpu(["a", "b", ""]) == ""
    fault = shared_gpu(["GPU-1", "GPU-2", "GPU-1"])
    assert "ranks 0 and 2 take the same GPU (GPU-1)" in fault
    assert "expected one for each of 3 ranks, got 2" in fault
