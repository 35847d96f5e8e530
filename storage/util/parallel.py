"""Threads for work that releases the interpreter's lock: decoding, hashing, reading files."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 4
BLOCK_ROWS = 256
T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int
) -> Generator[R, None, None]:
    """``map`` over ``workers`` threads: results in the order of ``items``, few of them in memory.

    At most ``AHEAD * workers`` items are processed ahead of the consumer, so a slow consumer holds
    no more than their results. An exception of ``function`` is raised in place of its result.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def map_rows(function: Callable[[int], R], count: int, *, workers: int) -> Iterator[R]:
    """``function`` of rows 0 to ``count - 1`` in order; each thread takes blocks of rows."""
    blocks = (range(at, min(at + BLOCK_ROWS, count)) for at in range(0, count, BLOCK_ROWS))
    for results in ordered_map(lambda rows: list(map(function, rows)), blocks, workers=workers):
        yield from results


def write_behind(write: Callable[[T], object], items: Iterable[T]) -> None:
    """Call ``write`` on one item after the other in a thread, while the next item is being made.

    The next item waits for the one before, so a slow disk slows its producer and fills no memory.
    The first error is raised. Whatever ends the loop, the write that has begun is finished.
    """
    latest: Future[object] = Future()
    latest.set_result(None)
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                latest.result()
                latest = pool.submit(write, item)
                del item  # or it would stay in memory while the next one is made
            latest.result()
        except BaseException as error:
            second = latest.exception()
            if second is not None and second is not error:
                error.add_note(f"and writing failed as well: {second}")
            raise


def for_each(function: Callable[[T], object], items: Iterable[T], *, workers: int) -> None:
    """Call ``function`` on all items, in any order, in ``workers`` threads.

    The first exception is raised at once, and so is an interrupt: nothing waits for calls that
    hang on a network. They end by themselves or with the process; no further call starts.
    """
    todo, numbers = list(items), itertools.count()  # ``next`` of a count is atomic
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and (number := next(numbers)) < len(todo):
            try:
                function(todo[number])
            except BaseException as error:
                results.put(error)
                return
            results.put(None)

    try:
        for _ in range(min(workers, len(todo))):
            threading.Thread(target=work, daemon=True).start()
        for _ in todo:
            error = results.get()
            if error is not None:
                raise error
    finally:
        stop.set()
