from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.errors import ConfigError
from gkd.storage.records.labels import MAX_CLASSES, class_numbers, count_classes

floats = st.floats(width=32)
bounds = st.none() | st.integers(1, 2**32)


@given(st.lists(floats | st.integers(0, 100).map(float), max_size=9), bounds)
def test_float_labels_name_their_class(values: list[float], stated: int | None) -> None:
    labels = np.array(values, np.float32)
    valid = {value: int(value) for value in labels.tolist() if value >= 0 and value.is_integer()}
    bound = MAX_CLASSES if stated is None else stated
    expected = [c if (c := valid.get(value, -1)) < bound else -1 for value in labels.tolist()]
    assert class_numbers(labels, stated).tolist() == expected


@given(st.lists(st.integers(0, 2**64 - 1), max_size=9), bounds, st.sampled_from(["i8", "u8"]))
def test_integer_labels_name_their_class(values: list[int], stated: int | None, kind: Any) -> None:
    labels = np.array(values, "u8").astype(kind)
    bound = MAX_CLASSES if stated is None else stated
    expected = [value if 0 <= value < bound else -1 for value in labels.tolist()]
    assert class_numbers(labels, stated).tolist() == expected


def test_unreadable_labels_name_no_class() -> None:
    labels = class_numbers(np.array([1, 2]), None, np.array([True, False]))
    assert labels.tolist() == [1, -1]


def test_a_label_may_be_large_if_there_are_many_images() -> None:
    assert count_classes(np.array([5, 999_999]), str) == 1_000_000
    with pytest.raises(ConfigError, match=r"^1: expected a label below 1,000,000 among 2 images"):
        count_classes(np.array([5, 1_000_000]), str)
    many = np.zeros(70_000, np.int64)
    many[3] = 1_100_000
    assert count_classes(many, str) == 1_100_001
