import threading
import time
from collections.abc import Iterator

import pytest

from gkd.storage.util.parallel import AHEAD, for_each, ordered_map, row_blocks


def test_results_come_in_order_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)

    def square(number: int) -> int:
        both.wait()  # passes only where two run at once
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


def test_an_exception_is_raised_at_its_place() -> None:
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
        both.wait()  # passes only where two run at once
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


def test_blocks_cover_all_rows() -> None:
    assert list(row_blocks(600)) == [range(256), range(256, 512), range(512, 600)]
    assert list(row_blocks(0)) == []
