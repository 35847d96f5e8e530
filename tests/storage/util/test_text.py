from dataclasses import dataclass

import pytest

from gkd.storage.util.text import describe_differences, first_few, printable


@pytest.mark.parametrize(
    ("items", "n", "expected"),
    [
        ([], 3, "none"),
        ([1, 2, 3], 3, "1, 2, 3"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        (list(range(5000)), 1, "0 and 4,999 more"),
    ],
)
def test_the_first_few_of_many(items: list[object], n: int, expected: str) -> None:
    assert first_few(items, n) == expected


def test_the_count_may_be_known_without_the_items() -> None:
    assert first_few([1, 2], 2, count=9) == "1, 2 and 7 more"


@dataclass
class _Inner:
    scale: float
    points: tuple[float, ...]


@dataclass
class _Outer:
    name: str
    inner: _Inner | None


def test_fields_that_differ_are_named_with_both_values() -> None:
    old = _Outer("a", _Inner(64.0, (0.1 + 0.2, 1.0)))
    assert describe_differences(old, old) == []
    assert describe_differences(old, _Outer("b", _Inner(64.0, (0.4, 1.0))), new_name="now") == [
        "name: expected a, now b",
        "inner.points: expected [0.3, 1], now [0.4, 1]",
    ]
    assert describe_differences(old, _Outer("b", None), ignore=("name", "inner")) == []


def test_values_that_look_alike_are_written_in_full() -> None:
    (line,) = describe_differences({"x": 0.1 + 0.2}, {"x": 0.3})
    assert line == "x: expected 0.30000000000000004, got 0.29999999999999999"
    (line,) = describe_differences({"std": (0.224 * 255, 1.0)}, {"std": (57.12001, 1.0)})
    assert line == "std: expected [57.12, 1], got [57.12001, 1]"
    (line,) = describe_differences({"x": "1"}, {"x": 1})
    assert line == "x: expected '1', got 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n\ttwo ü 识", "one\n\ttwo ü 识"),
        ("\x1b]0;title\x07", "\ufffd]0;title\ufffd"),
        ("gpj.\u202eexe", "gpj.\ufffdexe"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\ufffd"),
        ("over\rwritten", "over\ufffdwritten"),
    ],
)
def test_control_characters_are_replaced(text: str, expected: str) -> None:
    assert printable(text) == expected
