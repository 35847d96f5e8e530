"""How ranks agree on the name of a start; those of pipeline and trainer join real processes."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from gkd.storage.util.rendezvous import _common_name

# Tests of storage alone run without torch.
HashStore = pytest.importorskip("torch.distributed").HashStore

SOON = timedelta(seconds=60)


def test_all_ranks_accept_the_name_of_this_start_and_of_no_earlier_one() -> None:
    store = HashStore()
    names = set()
    for _ in range(2):  # the store outlives a restart
        with ThreadPoolExecutor(3) as pool:
            # The last ranks first: they find the name of the start before.
            ranks = [pool.submit(_common_name, store, rank, 3, SOON) for rank in (2, 1, 0)]
        (name,) = {rank.result() for rank in ranks}
        names.add(name)
    assert len(names) == 2


def test_a_rank_does_not_wait_for_long_for_an_answer_that_never_comes() -> None:
    store = HashStore()
    store.set("attempt", "of a start whose ranks have died")
    with pytest.raises(RuntimeError, match="rank 0 did not answer within"):
        _common_name(store, 1, 2, timedelta(seconds=0.2))
