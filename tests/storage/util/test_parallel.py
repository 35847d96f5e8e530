import threading
import time
from collections.abc import Iterator

import pytest

from gkd.storage.util.parallel import AHEAD, for_each, map_rows, ordered_map, write_behind


def test_results_come_in_order_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)

    def square(number: int) -> int:
        both.wait()  # passes only if two run at once
        time.sleep(0.001 * (number % 3))
        return number**2

    assert list(ordered_map(square, range(40), workers=2)) == [number**2 for number in range(40)]


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = ordered_map(str, items(), workers=2)
    assert next(results) == "0"
    assert len(taken) == AHEAD * 2
    assert next(results) == "1"
    assert len(taken) == AHEAD * 2 + 1


def test_an_exception_is_raised_in_order() -> None:
    def invert(number: int) -> float:
        return 1 / (number - 3)

    results = ordered_map(invert, range(100), workers=2)
    assert [next(results) for _ in range(3)] == [-1 / 3, -1 / 2, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_every_item_is_called_in_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)
    called: list[int] = []

    def call(number: int) -> None:
        both.wait()  # passes only if two run at once
        called.append(number)

    for_each(call, range(40), workers=2)
    assert sorted(called) == list(range(40))
    for_each(call, [], workers=2)


def test_an_exception_does_not_wait_for_calls_that_hang() -> None:
    hangs, free = threading.Event(), threading.Event()
    called: list[int] = []

    def call(number: int) -> None:
        called.append(number)
        if number == 0:
            hangs.set()
            free.wait()
        hangs.wait()
        raise ValueError(number)

    try:
        with pytest.raises(ValueError, match="1"):
            for_each(call, range(10), workers=2)
        assert sorted(called) == [0, 1]
    finally:
        free.set()


@pytest.mark.parametrize("count", [0, 1, 512, 600])
def test_all_rows_are_mapped_in_order(count: int) -> None:
    assert list(map_rows(lambda row: 2 * row, count, workers=3)) == list(range(0, 2 * count, 2))


def test_one_item_is_written_while_the_next_is_made_and_no_more() -> None:
    made, written = 0, 0
    allowed = threading.Semaphore(0)

    def items() -> Iterator[int]:
        nonlocal made
        for made in range(1, 6):
            if made > 1:
                assert written >= made - 2
                allowed.release()  # a write ends only once the next item is made
            yield made
        allowed.release()

    def write(item: int) -> None:
        nonlocal written
        assert allowed.acquire(timeout=30)
        written = item

    write_behind(write, items())
    assert (made, written) == (5, 5)


def test_an_error_of_a_write_is_raised_and_one_of_the_items_first() -> None:
    def fail(item: int) -> None:
        raise OSError("the disk is gone")

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second item")

    with pytest.raises(OSError, match="the disk is gone"):
        write_behind(fail, range(3))
    with pytest.raises(ValueError, match="no second item") as caught:
        write_behind(fail, items())
    assert caught.value.__notes__ == ["and writing failed as well: the disk is gone"]
    written: list[int] = []
    with pytest.raises(ValueError, match="no second item"):
        write_behind(written.append, items())
    assert written == [1], "what has begun is finished"
