from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.cache import Cache
from gkd.storage.errors import CorruptRecordError, SpecMismatchError
from gkd.storage.join import SKIPPED, join, match
from gkd.storage.records import open_records
from tests.caches import digest_of, labels_of, make_cache

if TYPE_CHECKING:
    from gkd.storage.records import Records


@dataclass
class FakeRecords:
    """As much of ``Records`` as a join asks for."""

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


def join_rows(cache: Cache, rows: list[int], *, num_classes: int = 50) -> npt.NDArray[np.int64]:
    """Join the images that these rows of the cache have, or would have."""
    records = FakeRecords(labels_of(cache.spec)[np.array(rows) % 100], num_classes)
    return join(cast("Records", records), cache, digests=digests_of_rows(rows))


def test_a_shuffled_and_filtered_copy_joins(cache: Cache) -> None:
    rows = [row for row in np.random.default_rng(0).permutation(100).tolist() if row != 41][:70]
    found = join_rows(cache, rows)
    assert found.dtype == np.int64
    assert found.tolist() == rows


def test_an_image_may_come_twice(cache: Cache) -> None:
    assert join_rows(cache, [5, 9, 5]).tolist() == [5, 9, 5]


def test_another_number_of_classes_is_refused(cache: Cache) -> None:
    message = "/data/other has 60 classes, the cache .* 50; use the records .*faces"
    with pytest.raises(SpecMismatchError, match=message):
        join_rows(cache, [1, 2], num_classes=60)


def test_unknown_images_are_counted_and_named(cache: Cache) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        join_rows(cache, [3, 200, 4, 201, 202, 203])
    message = str(caught.value)
    assert "4 of 6 images of /data/other are not in the cache" in message
    assert "other.rec, key 2; other.rec, key 4; other.rec, key 5;" in message
    assert "key 6" not in message


def test_skipped_images_under_other_keys_are_unknown_and_the_message_says_why(
    cache: Cache,
) -> None:
    message = r"1 of 2 images .* \(1 were skipped when it was made\), .* key 2"
    with pytest.raises(SpecMismatchError, match=message):
        join_rows(cache, [3, 41])


def test_skipped_images_are_known_by_their_keys(cache: Cache, monkeypatch: Any) -> None:
    (skipped,) = cache.samples().keys([41])
    monkeypatch.setattr(FakeRecords, "key", lambda self, row: skipped if row == 1 else "other")
    assert join_rows(cache, [3, 41, 4]).tolist() == [3, SKIPPED, 4]


def test_an_unreadable_image_that_was_not_skipped_is_named(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    for person in ("a", "b"):
        (folder / person).mkdir(parents=True)
        (folder / person / "1.jpg").write_bytes(b"once an image")
    records = open_records(folder)
    (folder / "b" / "1.jpg").unlink()
    records.num_classes = 50
    with pytest.raises(CorruptRecordError, match=r"b/1\.jpg"):
        join(records, cache, digests=np.zeros((2, 16), np.uint8))


def test_another_numbering_of_classes_is_refused_with_examples(cache: Cache) -> None:
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
def test_match_is_a_search_that_prefers_the_same_label(
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


def test_match_tells_equal_first_halves_apart() -> None:
    known = np.zeros((3, 16), np.uint8)
    known[:, 15] = [1, 2, 2]
    wanted = np.zeros((4, 16), np.uint8)
    wanted[:, 15] = [2, 2, 1, 3]
    labels = np.array([7, 7, 8])
    assert match(wanted, np.array([8, 9, 7, 7]), known, labels).tolist() == [2, 1, 0, -1]
