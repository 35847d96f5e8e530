import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gkd.storage.analysis.thumbnails import MAX_BYTES, thumbnails
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import CorruptRecordError, SpecMismatchError
from gkd.storage.records.images import digest
from gkd.storage.records.open import open_records
from tests.caches import dense_targets, make_logits, make_spec
from tests.storage.records.packs import jpeg, payload, write_pack

SAMPLES = 12


def image(row: int) -> bytes:
    """Row 3 is a PNG, row 4 a JPEG that is too large for a page."""
    if row not in (3, 4):
        return jpeg(row)
    pixels = np.random.default_rng(row).integers(0, 256, (112, 112, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if row == 3 else "JPEG", quality=98)
    return buffer.getvalue()


def pack(folder: Path, rows: list[int], *, bad: int | None = None) -> Path:
    bodies = [jpeg(row, (20, 20)) if row == bad else image(row) for row in rows]
    records = {key: payload(float(key % 3), body) for key, body in enumerate(bodies)}
    return write_pack(folder, records, classes=50).parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    spec = make_spec(num_samples=SAMPLES, shard_samples=5, views=("original",))
    writer = CacheWriter(tmp_path_factory.mktemp("made") / "c.gkd", spec)
    labels = np.arange(SAMPLES)
    for shard in writer.pending():
        rows = spec.shard_rows(shard)
        inside = slice(rows.start, rows.stop)
        targets, cut = dense_targets(make_logits(spec, "original")[inside], labels[inside], spec)
        digests = np.stack([np.frombuffer(digest(image(row)), np.uint8) for row in rows])
        samples = ShardSamples(list(map(str, rows)), labels[inside], digests, {})
        writer.write_shard(shard, {"original": targets}, samples, truncated={"original": cut})
    writer.finish()
    return Cache.open(writer.path)


def test_small_jpegs_are_used_as_stored(cache: Cache, tmp_path: Path) -> None:
    records = open_records(pack(tmp_path / "pack", list(range(SAMPLES))))
    found = thumbnails(records, cache.samples(), [2, 3, 4, 2], tmp_path, workers=1)
    assert list(found) == [2, 3, 4]
    assert found[2] == image(2)
    for row in (3, 4):
        with Image.open(io.BytesIO(found[row])) as face:
            assert (face.format, face.size) == ("JPEG", (112, 112))
            expected = np.asarray(Image.open(io.BytesIO(image(row))).convert("RGB"), float)
            assert np.abs(np.asarray(face, float) - expected).mean() < 40
    assert len(image(4)) > MAX_BYTES


def test_faces_are_found_in_any_row(cache: Cache, tmp_path: Path) -> None:
    rows = [7, 2, 11, 5]
    records = open_records(pack(tmp_path / "pack", rows))
    found = thumbnails(records, cache.samples(), [2, 5, 7, 9, 11], tmp_path, workers=1)
    assert found == {row: image(row) for row in (2, 5, 7, 11)}


def test_records_without_any_of_them_are_refused(cache: Cache, tmp_path: Path) -> None:
    records = open_records(pack(tmp_path / "pack", [20, 21, 22]))
    with pytest.raises(
        SpecMismatchError, match=r"contains none of the 2 images of the cache .*c\.gkd"
    ):
        thumbnails(records, cache.samples(), [0, 1], tmp_path, workers=1)
    assert thumbnails(records, cache.samples(), [], tmp_path, workers=1) == {}


def test_an_unreadable_record_is_left_out(cache: Cache, tmp_path: Path) -> None:
    folder = pack(tmp_path / "pack", [0, 1, 2])
    content = bytearray((folder / "train.rec").read_bytes())
    content[:4] = bytes(4)
    (folder / "train.rec").write_bytes(content)
    found = thumbnails(open_records(folder), cache.samples(), [0, 1], tmp_path, workers=1)
    assert found == {1: image(1)}


def test_a_face_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = pack(tmp_path / "pack", [0, 1], bad=1)
    spec = make_spec(num_samples=2, shard_samples=2, views=("original",))
    writer = CacheWriter(tmp_path / "c.gkd", spec)
    labels = np.arange(2)
    targets, cut = dense_targets(make_logits(spec, "original"), labels, spec)
    bodies = [image(0), jpeg(1, (20, 20))]
    digests = np.stack([np.frombuffer(digest(body), np.uint8) for body in bodies])
    samples = ShardSamples(["0", "1"], labels, digests, {})
    writer.write_shard(0, {"original": targets}, samples, truncated={"original": cut})
    writer.finish()
    with pytest.raises(CorruptRecordError, match="112x112"):
        thumbnails(
            open_records(folder), Cache.open(writer.path).samples(), [1], tmp_path, workers=1
        )
