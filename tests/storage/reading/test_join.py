from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.cache.reader import Cache, Samples
from gkd.storage.errors import CorruptRecordError, SpecMismatchError
from gkd.storage.reading.join import SKIPPED, Join, join, match
from gkd.storage.records.open import open_records
from tests.caches import digest_of, labels_of, make_cache, make_spec

if TYPE_CHECKING:
    from gkd.storage.records.base import Records


@dataclass
class FakeRecords:
    """As much of ``Records`` as a join uses."""

    labels: npt.NDArray[np.int64]
    num_classes: int = 50
    path: Path = Path("/data/other")

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        return f"other-{row}"

    def where(self, row: int) -> str:
        return f"other.rec, key {row + 1}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "c", skipped={41: "no image"})


def digests_of_rows(rows: list[int]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(map(digest_of, rows)), np.uint8).reshape(-1, 16)


def join_rows(
    cache: Cache,
    rows: list[int],
    *,
    num_classes: int = 50,
    renumber: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]] = lambda labels: labels,
    drop_unmatched: bool = False,
) -> Join:
    """Join the images of these rows of the cache."""
    labels = renumber(labels_of(cache.spec)[np.array(rows) % 100])
    records = cast("Records", FakeRecords(labels, num_classes))
    digests = digests_of_rows(rows)
    return join(records, cache, digests=digests, drop_unmatched=drop_unmatched)


def every_row(cache: Cache) -> list[int]:
    return [row for row in range(len(cache.samples())) if row != 41]


def test_a_shuffled_and_filtered_copy_joins(cache: Cache) -> None:
    rows = [row for row in np.random.default_rng(0).permutation(100).tolist() if row != 41][:70]
    found = join_rows(cache, rows)
    assert found.rows.dtype == np.int64
    assert found.rows.tolist() == rows
    assert (found.classes, found.num_classes, found.unmatched) == (None, 50, 0)


def test_an_image_may_come_twice(cache: Cache) -> None:
    assert join_rows(cache, [5, 9, 5]).rows.tolist() == [5, 9, 5]


def test_more_classes_are_refused(cache: Cache) -> None:
    message = "/data/other has 60 classes, the cache .* 50; use the records .*--drop-unmatched"
    with pytest.raises(SpecMismatchError, match=message):
        join_rows(cache, [1, 2], num_classes=60)


def test_unknown_images_are_counted_and_named(cache: Cache) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        join_rows(cache, [3, 200, 4, 201, 202, 203])
    message = str(caught.value)
    assert "4 of 6 images of /data/other are not in the cache" in message
    assert "other.rec, key 2, other.rec, key 4, other.rec, key 5 and 1 more;" in message
    assert "key 6" not in message


def test_skipped_images_with_other_keys_are_unknown_and_the_message_says_why(
    cache: Cache,
) -> None:
    message = r"1 of 2 images .* \(1 were skipped when it was made\): .* key 2"
    with pytest.raises(SpecMismatchError, match=message):
        join_rows(cache, [3, 41])


def test_skipped_images_are_known_by_their_keys(cache: Cache, monkeypatch: Any) -> None:
    (skipped,) = cache.samples().keys([41])
    monkeypatch.setattr(FakeRecords, "key", lambda self, row: skipped if row == 1 else "other")
    assert join_rows(cache, [3, 41, 4]).rows.tolist() == [3, SKIPPED, 4]


def test_an_unreadable_image_that_was_not_skipped_is_named(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    for person in ("a", "b"):
        (folder / person).mkdir(parents=True)
        (folder / person / "1.jpg").write_bytes(b"once an image")
    records = open_records(folder)
    (folder / "b" / "1.jpg").unlink()
    records.num_classes = 50
    for dropped in (False, True):
        with pytest.raises(CorruptRecordError, match=r"b/1\.jpg"):
            join(records, cache, digests=np.zeros((2, 16), np.uint8), drop_unmatched=dropped)


def test_unknown_images_are_left_out_on_request(cache: Cache) -> None:
    found = join_rows(cache, [3, 200, 41, 4, 201], drop_unmatched=True)
    assert found.rows.tolist() == [3, SKIPPED, SKIPPED, 4, SKIPPED]
    assert found.unmatched == 3


def test_records_without_any_known_image_are_refused_even_so(cache: Cache) -> None:
    with pytest.raises(SpecMismatchError, match="none of the 2 images of /data/other has targets"):
        join_rows(cache, [200, 201], drop_unmatched=True)


def test_a_permuted_numbering_is_inferred(cache: Cache) -> None:
    numbers = np.random.default_rng(1).permutation(50)
    rows = every_row(cache)[::-1]
    found = join_rows(cache, rows, renumber=numbers.__getitem__)
    assert found.rows.tolist() == rows
    assert found.num_classes == 50
    assert found.classes is not None
    assert found.classes.dtype == np.uint32
    np.testing.assert_array_equal(found.classes, numbers)


def test_a_single_class_without_images_is_inferred(cache: Cache) -> None:
    numbers = np.random.default_rng(1).permutation(50)
    rows = [row for row in every_row(cache) if labels_of(cache.spec)[row] != 17]
    found = join_rows(cache, rows, renumber=numbers.__getitem__)
    np.testing.assert_array_equal(found.classes, numbers)


def test_two_classes_without_images_cannot_be_inferred(cache: Cache) -> None:
    numbers = np.random.default_rng(1).permutation(50)
    rows = [row for row in every_row(cache) if labels_of(cache.spec)[row] not in (17, 30)]
    unknown = ", ".join(map(str, sorted(numbers[[17, 30]])))
    message = f"2 classes of the records have no image in the cache: {unknown}, so which"
    with pytest.raises(SpecMismatchError, match=message):
        join_rows(cache, rows, renumber=numbers.__getitem__)


def test_a_filtered_copy_with_fewer_classes_keeps_its_own_numbers(cache: Cache) -> None:
    """As an image folder without some identities, in which the others get smaller numbers."""
    removed = np.array([3, 17, 30])
    rows = [row for row in every_row(cache) if labels_of(cache.spec)[row] not in removed]
    numbers = np.delete(np.arange(50), removed)
    found = join_rows(
        cache, rows, num_classes=47, renumber=lambda labels: np.searchsorted(numbers, labels)
    )
    assert found.num_classes == 50
    assert found.classes is not None
    np.testing.assert_array_equal(found.classes[numbers], np.arange(47))
    assert found.classes[removed].tolist() == [47, 48, 49]


def test_a_filtered_copy_with_the_same_numbers_needs_no_map(cache: Cache) -> None:
    rows = [row for row in every_row(cache) if labels_of(cache.spec)[row] < 30]
    found = join_rows(cache, rows, num_classes=30)
    assert (found.classes, found.num_classes) == (None, 50)


def test_classes_of_dropped_images_are_counted(cache: Cache) -> None:
    """A folder with three new identities first, which shift all others."""
    records = FakeRecords(
        np.concatenate([labels_of(cache.spec)[every_row(cache)] + 3, [0, 1, 2]]), 53
    )
    digests = digests_of_rows([*every_row(cache), 200, 201, 202])
    found = join(cast("Records", records), cache, digests=digests, drop_unmatched=True)
    assert (found.num_classes, found.unmatched) == (53, 3)
    np.testing.assert_array_equal(found.classes, np.arange(50) + 3)


@pytest.mark.parametrize("new", [2, 5])
def test_new_identities_take_the_numbers_of_removed_ones(cache: Cache, new: int) -> None:
    """A folder without three identities, and with new ones first, whose images are dropped."""
    removed = np.array([3, 17, 30])
    rows = [row for row in every_row(cache) if labels_of(cache.spec)[row] not in removed]
    kept = np.delete(np.arange(50), removed)
    labels = np.searchsorted(kept, labels_of(cache.spec)[rows]) + new
    records = FakeRecords(np.concatenate([labels, np.arange(new)]), 47 + new)
    digests = digests_of_rows([*rows, *range(200, 200 + new)])
    with pytest.raises(SpecMismatchError):
        join(cast("Records", records), cache, digests=digests)
    found = join(cast("Records", records), cache, digests=digests, drop_unmatched=True)
    assert (found.num_classes, found.unmatched) == (max(50, 47 + new), new)
    assert found.classes is not None
    np.testing.assert_array_equal(found.classes[kept], np.arange(47) + new)
    assert found.classes[removed].tolist() == [*range(min(new, 3)), *range(49, 49 + 3 - new)]


def test_a_split_class_is_refused(cache: Cache) -> None:
    rows = every_row(cache)
    labels = labels_of(cache.spec)[rows].copy()
    first, second = np.flatnonzero(labels == 7)
    labels[second] = 8
    records = cast("Records", FakeRecords(labels))
    message = "no numbering maps one to the other: class 7 of the cache is 7 and 8 in the records;"
    with pytest.raises(SpecMismatchError, match=message):
        join(records, cache, digests=digests_of_rows(rows))
    labels[first] = 8
    message = "class 8 of the records is 7 and 8 in it; use records with the numbering"
    with pytest.raises(SpecMismatchError, match=message):
        join(records, cache, digests=digests_of_rows(rows))


class FakeCache:
    """As much of a cache as a join uses."""

    def __init__(self, labels: list[int], digests: npt.NDArray[np.uint8], num_classes: int) -> None:
        self.path = Path("/data/fake.gkd")
        self.spec = make_spec(num_samples=len(labels), num_classes=num_classes)
        present = np.ones(len(labels), bool)
        self.found = Samples(cast("Cache", self), np.array(labels), digests, present)

    def samples(self) -> Samples:
        return self.found


def test_one_image_of_two_classes_goes_to_each_under_a_permutation() -> None:
    """Equal images with two labels, as in large packs, do not prevent the inference."""
    digests = digests_of_rows([0, 1, 2, 9, 9])
    cache = cast("Cache", FakeCache([0, 1, 2, 0, 1], digests, 3))
    records = cast("Records", FakeRecords(np.array([2, 0, 1, 0, 2]), 3))
    found = join(records, cache, digests=digests_of_rows([0, 1, 2, 9, 9]))
    np.testing.assert_array_equal(found.classes, [2, 0, 1])
    assert found.rows.tolist() == [0, 1, 2, 4, 3]


def test_an_image_that_contradicts_the_numbering_is_refused() -> None:
    digests = digests_of_rows([0, 1, 2, 9, 9])
    cache = cast("Cache", FakeCache([0, 1, 2, 0, 1], digests, 3))
    records = cast("Records", FakeRecords(np.array([2, 0, 1, 1]), 3))
    message = r"1 of 4 images .* other\.rec, key 4 has label 1, the cache 2 in the records' numberi"
    with pytest.raises(SpecMismatchError, match=message):
        join(records, cache, digests=digests_of_rows([0, 1, 2, 9]))


def test_a_contradictory_numbering_is_refused_with_examples(cache: Cache) -> None:
    labels = labels_of(cache.spec)[:10].copy()
    labels[[4, 6]] = [11, 12]
    records = cast("Records", FakeRecords(labels))
    with pytest.raises(SpecMismatchError) as caught:
        join(records, cache, digests=digests_of_rows(list(range(10))))
    message = str(caught.value)
    assert "2 of 10 images" in message
    assert "the class numbering differs" in message
    assert "other.rec, key 5 has label 11, the cache 28" in message
    assert "other.rec, key 7 has label 12, the cache 42" in message


words = st.binary(min_size=1, max_size=1).map(lambda byte: bytes(7) + byte)
images = st.tuples(words, words, st.integers(0, 2))


@given(st.lists(images, max_size=12), st.lists(images, max_size=12) | st.just([]))
def test_match_prefers_the_same_label(
    wanted: list[tuple[bytes, bytes, int]], known: list[tuple[bytes, bytes, int]]
) -> None:
    small = [(a[-1:] * 8, b[-1:] * 8, label) for a, b, label in known]
    asked = small[: len(wanted) // 2] + wanted
    asked = [(a, b, (label + i) % 3) for i, (a, b, label) in enumerate(asked)]

    def arrays(
        rows: list[tuple[bytes, bytes, int]],
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        digests = np.frombuffer(b"".join(a + b for a, b, _ in rows), np.uint8).reshape(-1, 16)
        return digests, np.array([label for *_, label in rows], np.int64)

    def search(digest: bytes, label: int) -> int:
        same = [i for i, (a, b, _) in enumerate(small) if a + b == digest]
        agreeing = [i for i in same if small[i][2] == label]
        return (agreeing or same or [-1])[0]

    found = match(*arrays(asked), *arrays(small))
    assert found.tolist() == [search(a + b, label) for a, b, label in asked]


def test_match_compares_both_halves() -> None:
    known = np.zeros((3, 16), np.uint8)
    known[:, 15] = [1, 2, 2]
    wanted = np.zeros((4, 16), np.uint8)
    wanted[:, 15] = [2, 2, 1, 3]
    labels = np.array([7, 7, 8])
    assert match(wanted, np.array([8, 9, 7, 7]), known, labels).tolist() == [2, 1, 0, -1]
