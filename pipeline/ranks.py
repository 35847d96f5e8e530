"""The processes that make one cache together: torchrun's ranks, or this process alone."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from gkd.storage.errors import IncompleteCacheError
from gkd.storage.util import rendezvous, torchrun_env
from gkd.storage.util.torch_device import gpu_id

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
POLL_SECONDS = 0.2
RESUME = "run the same command again, with any number of ranks, to resume"


class Ranks:
    """This process's number among ``world_size``, and the store at which they all meet.

    ``run`` is an id that the ranks of this start have in common. Within the context a rank shows
    by a counter in the store that it is alive. An error that leaves the context of one rank ends
    the others at their next ``check`` or ``once``, by SystemExit: the first has said why.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, store: Store | None = None, run: str = ""
    ) -> None:
        self.rank, self.world_size, self.run = rank, world_size, run or uuid4().hex
        self._store = store or dist.HashStore()  # type: ignore[attr-defined]
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def check(self) -> None:
        """End this process if another rank has failed.

        Raises:
            SystemExit: if another rank has failed.
            IncompleteCacheError: if the store is gone, and with it the process that held it.
        """
        if self._has("failed"):
            raise SystemExit(1)

    def once(self, step: str, work: Callable[[], object]) -> None:
        """Wait for all ranks, let the first do ``work``, and return in all when it is done.

        All ranks call this with the same steps, each once, in the same order.

        Raises:
            IncompleteCacheError: if a rank that is waited for has ended.
            SystemExit: if another rank has failed.
        """
        if self.rank == 0:
            self._wait_for({rank: f"{step}/{rank}" for rank in range(1, self.world_size)})
            work()
        self._set(f"{step}/{self.rank}")
        if self.rank:
            self._wait_for({0: f"{step}/0"})

    def _wait_for(self, keys: dict[int, str]) -> None:
        """Wait until these ranks have set their keys, as long as they are alive."""
        heard: dict[int, tuple[int, float]] = dict.fromkeys(keys, (-1, time.monotonic()))
        wait = rendezvous.Wait("to go on", None)
        while keys and not self._has(*keys.values()):
            self.check()
            for rank, key in keys.items():
                with self._store_errors():
                    beats, now = self._store.add(f"beats/{rank}", 0), time.monotonic()
                if beats != heard[rank][0]:
                    heard[rank] = beats, now
                elif now - heard[rank][1] > SILENT_SECONDS and not self._has(key):
                    raise self._ended(rank)
            wait.say(lambda: [rank for rank, key in keys.items() if not self._has(key)])
            time.sleep(POLL_SECONDS)

    def _has(self, *keys: str) -> bool:
        with self._store_errors():
            return self._store.check(list(keys))

    def _set(self, key: str) -> None:
        with self._store_errors():
            self._store.set(key, "1")

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._ended(0) from error

    def _ended(self, rank: int) -> IncompleteCacheError:
        return IncompleteCacheError(
            f"rank {rank} of {self.world_size} ended before the cache was finished; see why in "
            f"its own output, and {RESUME}"
        )

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store is gone, which `check` reports
            while not self._leaving.wait(BEAT_SECONDS):
                self._store.add(f"beats/{self.rank}", 1)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(IncompleteCacheError, SystemExit):
            if error is None:
                self._set(f"left/{self.rank}")
                if self.rank == 0:  # this process may hold the store, so it leaves last
                    self._wait_for({rank: f"left/{rank}" for rank in range(1, self.world_size)})
            elif not isinstance(error, SystemExit):
                self._set("failed")
        self._leaving.set()
        self._heart.join()


@contextmanager
def joined_ranks(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks that torchrun started, once all have arrived, or this process alone.

    Raises:
        ConfigError: if not all arrive in time, the environment does not say where they meet, or
            two of them take the same GPU as their ``device``.
    """
    rank, world_size, store, run = torchrun_env.rank(), torchrun_env.world_size(), None, ""
    if world_size == 1:
        torchrun_env.note_other_launcher()
    else:
        shared, run = rendezvous.meet(rendezvous.ARRIVAL, gpu=gpu_id(device))
        store = PrefixStore(run, shared)
    with Ranks(rank, world_size, store, run) as ranks:
        yield ranks
