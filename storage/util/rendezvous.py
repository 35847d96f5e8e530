"""How the ranks of one start meet at a store (``torch.distributed``), under torchrun or alike.

The rest of storage needs no torch, so it is imported where ranks meet.
"""

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# All ranks start at once: one that has not arrived by then, or whose torchrun is gone, never will.
ARRIVAL = timedelta(minutes=10)
_POLL_SECONDS = 0.05


def meet(arrival: timedelta) -> "tuple[Store, str]":
    """Wait until all ranks have arrived; their store, and a name that this start alone has.

    The store belongs to the address in ``MASTER_ADDR`` and ``MASTER_PORT``. torchrun's outlives
    its restarts, so keys are to be prefixed by the name: what ranks wrote that have died since
    must not be taken for the words of these.

    Raises:
        RuntimeError: if a rank has not arrived after ``arrival``, or the store is unreachable.
        ValueError: if the environment does not describe the ranks.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=arrival))
    return store, _common_name(store, rank, world_size, arrival)


def _common_name(store: "Store", rank: int, world_size: int, arrival: timedelta) -> str:
    """A name that rank 0 gives to this start and the other ranks confirm.

    Each of them answers to the name with a random word, and accepts it once rank 0 repeats the
    word: a name left over from an earlier start gets no such reply.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + arrival.total_seconds()
    if rank == 0:
        store.set("attempt", mine)
        answers = [store.get(f"{mine}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{mine}/heard", " ".join(answers))
        return mine
    while time.monotonic() < deadline:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", mine)
        time.sleep(_POLL_SECONDS)
        if store.check([f"{name}/heard"]) and mine in store.get(f"{name}/heard").decode():
            return name
    raise RuntimeError(f"rank 0 did not answer within {arrival}")
