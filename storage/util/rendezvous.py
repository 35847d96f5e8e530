"""How the ranks of one start meet at a store (``torch.distributed``), under torchrun or alike.

The rest of storage needs no torch, so it is imported where ranks meet.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING

from gkd.storage.errors import ConfigError
from gkd.storage.util import torchrun_env

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# All ranks start at once: one that has not arrived by then, or whose torchrun is gone, never will.
ARRIVAL = timedelta(minutes=10)
# A store that accepts connections answers at once.
_ANSWER = timedelta(seconds=20)
_POLL_SECONDS = 0.05
_FIRST_WORD, _EVERY_WORD = 3.0, 30.0


class Wait:
    """A wait for other ranks that says on stderr for whom: after 3 seconds, then every 30."""

    def __init__(self, where: str, limit: timedelta | None) -> None:
        self._where, self._limit = where, limit
        self._began = time.monotonic()
        self._next = _FIRST_WORD

    def say(self, whom: Callable[[], Sequence[int]]) -> None:
        """Say which ranks ``whom`` is waited for, if it is time to."""
        waited = time.monotonic() - self._began
        if waited >= self._next:
            self._next = waited + _EVERY_WORD
            limit = f"{self._limit} at most" if self._limit else "as long as it lives"
            if self._where.startswith("at "):
                limit += "; unset WORLD_SIZE if it is to work alone"
            print(
                f"rank {torchrun_env.rank()} of {torchrun_env.world_size()} has waited "
                f"{waited:.0f} s for {_named(whom())} {self._where}, and waits {limit}",
                file=sys.stderr,
                flush=True,
            )

    def pause(self, whom: Callable[[], Sequence[int]]) -> None:
        """``say`` and sleep for a moment.

        Raises:
            ConfigError: if the time is up.
        """
        self.say(whom)
        over = self._limit and time.monotonic() - self._began > self._limit.total_seconds()
        if over:
            raise ConfigError(
                f"{_named(whom())} of WORLD_SIZE={torchrun_env.world_size()} did not arrive "
                f"{self._where} within {self._limit}; see why in its own output and start all "
                "ranks again with torchrun, or unset WORLD_SIZE for a process that works alone"
            )
        time.sleep(_POLL_SECONDS)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"


def meet(arrival: timedelta, *, gpu: str = "") -> "tuple[Store, str]":
    """Wait until all ranks have arrived; their store, and a name that this start alone has.

    The store belongs to the address in ``MASTER_ADDR`` and ``MASTER_PORT``. torchrun's outlives
    its restarts, so keys are to be prefixed by the name: what ranks wrote that have died since
    must not be taken for the words of these. ``gpu`` identifies the GPU that this rank takes.

    Raises:
        ConfigError: if the environment does not describe the ranks, a rank has not arrived after
            ``arrival``, the store is unreachable, or two ranks take one GPU.
        SystemExit: instead of the last, on all ranks but the first.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    rank, world_size = torchrun_env.rank(), torchrun_env.world_size()
    address, port = torchrun_env.meeting_point()
    wait = Wait(f"at {address}:{port}", arrival)
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not holds and not _is_open(address, port):
        wait.pause(lambda: [0])
    try:
        store = _answer_of(
            lambda: TCPStore(
                address,
                port,
                world_size,
                is_master=holds,
                timeout=arrival,
                multi_tenant=True,
                wait_for_workers=False,
            ),
            min(arrival, _ANSWER),
        )
        name, gpus = _common_name(store, rank, world_size, wait, gpu)
    except (RuntimeError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the ranks of WORLD_SIZE={world_size} cannot meet at {address}:{port} ({reason}); "
            "free the port or name another in MASTER_PORT, see whether rank 0 has ended, or start "
            "all ranks with torchrun"
        ) from error
    if fault := shared_gpu(gpus):
        raise ConfigError(fault) if rank == 0 else SystemExit(1)
    return store, name


def _is_open(address: str, port: int) -> bool:
    """Whether something listens there; a name that is not known yet may come to be."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except (OSError, UnicodeError):
        return False
    return True


def _answer_of(connect: "Callable[[], Store]", patience: timedelta) -> "Store":
    """The result of ``connect``, which waits for ever if what listens there is no store."""
    answer: Future[Store] = Future()

    def try_to() -> None:
        try:
            answer.set_result(connect())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=try_to, daemon=True).start()
    try:
        return answer.result(patience.total_seconds())
    except TimeoutError as error:
        raise TimeoutError(f"what listens there has not answered for {patience}") from error


def _common_name(
    store: "Store", rank: int, world_size: int, wait: Wait, gpu: str = ""
) -> tuple[str, list[str]]:
    """A name that rank 0 gives to this start and the other ranks confirm, and the ranks' GPUs.

    Each of them answers to the name with a random word, and accepts it once rank 0 repeats the
    word: a name left over from an earlier start gets no such reply.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        keys = [f"{mine}/{other}" for other in range(1, world_size)]
        while not store.check(keys):
            wait.pause(lambda: [n for n, key in enumerate(keys, 1) if not store.check([key])])
        answers = [[mine, gpu], *(json.loads(store.get(key)) for key in keys)]
        store.set(f"{mine}/heard", json.dumps(answers))
        return mine, [taken for _, taken in answers]
    while True:
        if store.check(["attempt"]):
            name = store.get("attempt").decode()
            store.set(f"{name}/{rank}", json.dumps([mine, gpu]))
            if store.check([f"{name}/heard"]):
                answers = json.loads(store.get(f"{name}/heard"))
                if [mine, gpu] in answers:
                    return name, [taken for _, taken in answers]
        wait.pause(lambda: [0])


def shared_gpu(gpus: Sequence[str]) -> str:
    """What is wrong if two ranks take one GPU, each named by an id of its own; empty if none do.

    ``gpus`` has an id for each rank, empty for one on the CPU.
    """
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu and first.setdefault(gpu, rank) != rank:
            return (
                f"ranks {first[gpu]} and {rank} take the same GPU ({gpu}): expected one for each "
                f"of {len(gpus)} ranks, got {len(set(gpus))}; start fewer ranks, or show each its "
                "own with CUDA_VISIBLE_DEVICES"
            )
    return ""
