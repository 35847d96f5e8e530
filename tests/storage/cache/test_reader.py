import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit, Manifest
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec, DrawsSpec
from gkd.storage.cache.targets import encode_log_probs
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, CorruptShardError, IncompleteCacheError
from tests.caches import digest_of, labels_of, make_cache, make_spec, write_shard
from tests.paths import ROOT
from tests.tampering import edit_json, flip_bit, rehash, rewrite_row

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "c", skipped={41: "no image"})


@pytest.fixture
def cache(made: Cache, tmp_path: Path) -> Cache:
    return Cache.open(shutil.copytree(made.path, tmp_path / "faces.gkd"))


def test_samples_have_label_digest_and_key_of_their_row(cache: Cache) -> None:
    samples = cache.samples()
    assert len(samples) == 100
    np.testing.assert_array_equal(samples.labels, labels_of(cache.spec))
    np.testing.assert_array_equal(np.flatnonzero(~samples.present), [41])
    assert bytes(samples.digests[40]) == digest_of(40)
    assert not samples.digests[41].any()
    assert samples.keys([99, 0, 41]) == ["100", "1", "42"]


def test_a_skipped_sample_has_an_empty_group_and_a_reason(cache: Cache) -> None:
    targets = cache.read_shard(1, "flipped")
    assert targets.sizes[1] == 0
    assert (targets.sizes[2:] > 0).all()
    assert targets.secondary[1].tolist() == [0, 0, 0]
    assert cache.commit(1).skipped == {"42": "no image"}
    assert cache.commit(0).skipped == {}


def test_the_table_of_samples_is_plain_parquet(cache: Cache) -> None:
    table = pq.read_table(cache.path / "samples" / "000001.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("row", "int64"),
        ("key", "string"),
        ("label", "int64"),
        ("digest", "fixed_size_binary[16]"),
    ]
    assert table["row"].to_pylist() == list(range(40, 80))
    assert table["digest"][1].as_py() is None
    assert table["digest"][2].as_py() == digest_of(42)


def test_the_reader_in_the_specification_reads(cache: Cache) -> None:
    text = (ROOT / "storage" / "FORMAT.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    targets = cache.read_shard(1, "flipped")
    offsets, classes, probabilities, secondary = names["read_shard"](cache.path, 1, "flipped")
    np.testing.assert_array_equal(offsets, targets.offsets)
    np.testing.assert_array_equal(classes, targets.indices)
    np.testing.assert_array_equal(secondary, targets.secondary)
    np.testing.assert_array_equal(encode_log_probs(np.log(probabilities)), targets.log2_probs)


def test_the_specification_names_every_field(cache: Cache) -> None:
    text = (ROOT / "storage" / "FORMAT.md").read_text()
    fields = {*CacheSpec.__struct_fields__, *Commit.__struct_fields__, *Manifest.__struct_fields__}
    assert {field for field in fields if field not in text} == set()
    for name, array in layout.arrays(make_spec(draws=DrawsSpec(2, 1.0, "all")), "original").items():
        assert f"| `{name}` | {array.dtype} |" in text


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: expected a cache of targets .* got nothing"):
        Cache.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="got another folder; check the path"):
        Cache.open(tmp_path)


def test_an_unfinished_cache_opens_only_on_request(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    write_shard(writer, 1)
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards are written.* again to resume"):
        Cache.open(writer.path)
    cache = Cache.open(writer.path, complete=False)
    assert len(cache.read_shard(1, "original")) == 40
    with pytest.raises(CorruptShardError, match=r"000000\.json: missing"):
        cache.read_shard(0, "original")
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards"):
        _ = cache.id


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        (
            "original/sizes/c/0/0",
            "delete this shard's commit record and manifest.json and run the same "
            "`gkd cache-teacher` again",
        ),
        ("manifest.json", "or delete manifest.json and run the same `gkd cache-teacher` again"),
        ("original/sizes/zarr.json", "or make it again in another folder"),
    ],
)
def test_a_damage_names_its_remedy(cache: Cache, file: str, remedy: str) -> None:
    (cache.path / file).write_bytes(b"{")
    with pytest.raises(CorruptShardError) as caught:
        Cache.open(cache.path).read_shard(0, "original")
    message = str(caught.value)
    assert message.startswith(f"{cache.path / file}: ")
    assert "repair it by `gkd targets pull` into the same folder" in message
    assert message.endswith(remedy)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_another_format_is_refused(cache: Cache) -> None:
    edit_json(cache.path / "zarr.json", lambda root: root["attributes"].update(format=2))
    with pytest.raises(ConfigError, match="expected a cache of format 1, got 2; update gkd"):
        Cache.open(cache.path)


def replace_codecs(codecs: list[dict[str, Any]]) -> Edit:
    return lambda array: array.update(codecs=codecs)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("original/indices", lambda a: a.update(data_type="object"), "data_type: expected 'uint32"),
        ("original/sizes", lambda a: a.update(data_type="uint64"), "data_type: expected 'uint16"),
        ("flipped/sizes", replace_codecs([{"name": "pickle"}]), "codecs: expected"),
        ("flipped/secondary", replace_codecs([{"name": "numcodecs.pickle"}]), "codecs: expected"),
        ("original/indices", replace_codecs([{"name": "bytes"}]), "codecs: expected"),
        ("original/sizes", lambda a: a.update(shape=[3, 1 << 40]), "shape: expected"),
        ("original/sizes", lambda a: a.update(fill_value=7), "fill_value: expected 0, got 7"),
        (
            "original/sizes",
            lambda a: a["chunk_grid"]["configuration"].update(chunk_shape=[1, 1]),
            "chunk_grid: expected",
        ),
        (
            "original/sizes",
            lambda a: a["chunk_key_encoding"]["configuration"].update(separator="/../"),
            "chunk_key_encoding: expected",
        ),
        ("original", lambda g: g.update(consolidated_metadata={}), "consolidated_metadata: "),
        ("", lambda g: g["attributes"].update(surprise=1), "unknown field `surprise`"),
        ("", lambda g: g["attributes"].update(max_group=70000), "max_group: expected 1 to 65535"),
        ("", lambda g: g["attributes"].update(views=["../original"]), "Invalid enum value"),
        ("", lambda g: g["attributes"].update(num_samples=1 << 60), "shape: expected"),
    ],
)
def test_hostile_metadata_is_refused_before_zarr_sees_it(
    cache: Cache, file: str, edit: Edit, message: str
) -> None:
    edit_json(cache.path / file / "zarr.json", edit)
    with pytest.raises(CorruptShardError, match=message):
        Cache.open(cache.path)


def test_invalid_json_is_refused(cache: Cache) -> None:
    for content in (b"{", b"\xff", b"[" * 100_000, b"[]", b" " * (1 << 21)):
        (cache.path / "original" / "zarr.json").write_bytes(content)
        with pytest.raises(CorruptShardError, match=r"original/zarr\.json"):
            Cache.open(cache.path)


def test_metadata_that_another_program_reformatted_is_refused(cache: Cache) -> None:
    with (cache.path / "zarr.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptShardError, match=r"not that in manifest\.json"):
        Cache.open(cache.path)


def test_any_flipped_bit_of_the_manifest_is_an_error(cache: Cache) -> None:
    size = (cache.path / layout.MANIFEST).stat().st_size
    for bit in np.random.default_rng(0).integers(0, size * 8, 40).tolist():
        flip_bit(cache.path / layout.MANIFEST, bit)
        with pytest.raises(CorruptShardError, match=r"manifest\.json"):
            Cache.open(cache.path)
        flip_bit(cache.path / layout.MANIFEST, bit)
    Cache.open(cache.path)


@pytest.mark.parametrize("file", ["zarr.json", "original/indices/c/0/0", "commits/000000.json"])
def test_links_are_refused(cache: Cache, file: str, tmp_path: Path) -> None:
    path = cache.path / file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptShardError, match=f"{path}: a symbolic link"):
        Cache.open(cache.path).read_shard(0, "original")


def test_a_linked_folder_is_refused(cache: Cache, tmp_path: Path) -> None:
    (cache.path / "flipped" / "sizes").rename(tmp_path / "elsewhere")
    (cache.path / "flipped" / "sizes").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptShardError, match="flipped/sizes: a symbolic link"):
        Cache.open(cache.path)


@pytest.mark.parametrize("array", ["indices", "log2_probs", "sizes", "secondary"])
def test_a_missing_file_is_an_error_and_never_zeros(cache: Cache, array: str) -> None:
    path = cache.path / layout.arrays(cache.spec, "original")[array].shard_file(1)
    path.unlink()
    with pytest.raises(CorruptShardError, match=f"{path}: missing"):
        cache.read_shard(1, "original")


@pytest.mark.parametrize("array", ["indices", "log2_probs", "sizes", "secondary"])
def test_a_truncated_file_is_an_error(cache: Cache, array: str) -> None:
    path = cache.path / layout.arrays(cache.spec, "original")[array].shard_file(1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"expected \d+ bytes, got \d+"):
        cache.read_shard(1, "original")


@pytest.mark.parametrize("array", ["indices", "log2_probs", "sizes", "secondary"])
def test_any_flipped_bit_is_an_error_when_read(cache: Cache, array: str) -> None:
    path = cache.path / layout.arrays(cache.spec, "original")[array].shard_file(1)
    for bit in np.random.default_rng(1).integers(0, path.stat().st_size * 8, 25).tolist():
        flip_bit(path, bit)
        with pytest.raises(CorruptShardError, match=str(path)):
            cache.read_shard(1, "original")
        flip_bit(path, bit)


def test_a_commit_record_that_names_other_paths_is_refused(cache: Cache) -> None:
    def escape(commit: dict[str, Any]) -> None:
        commit["files"]["../../etc/passwd"] = commit["files"].pop("samples/000000.parquet")

    edit_json(cache.path / layout.commit_file(0), escape)
    unfinished = Cache(cache.path, cache.spec, None, "")
    with pytest.raises(CorruptShardError, match="its list of files is not that of a shard"):
        unfinished.read_shard(0, "original")
    with pytest.raises(CorruptShardError, match=r"not that in manifest\.json"):
        cache.read_shard(0, "original")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(shard=1), "not the record of shard 0, rows 0 to 39"),
        (lambda c: c.update(rows=[0, 1]), "not the record of shard 0"),
        (lambda c: c["views"].pop("flipped"), "expected views original, flipped, got original"),
        (
            lambda c: c["views"]["flipped"].update(entries=10**12),
            "more entries or truncated groups",
        ),
        (lambda c: c["views"]["flipped"].update(entries=-1), "not the JSON"),
        (lambda c: c.update(extra=1), "unknown field `extra`"),
    ],
)
def test_inconsistent_commit_records_are_refused(cache: Cache, edit: Edit, message: str) -> None:
    edit_json(cache.path / layout.commit_file(0), edit)
    with pytest.raises(CorruptShardError, match=message):
        Cache(cache.path, cache.spec, None, "").read_shard(0, "original")


def test_inconsistent_sizes_are_refused(cache: Cache) -> None:
    sizes = cache.read_shard(0, "original").sizes.astype(np.uint16)
    more = sizes.copy()
    more[0] += 1
    rewrite_row(cache, "original/sizes", 0, more)
    with pytest.raises(
        CorruptShardError, match=r"original/sizes/c/0/0: group sizes .* a sum other than"
    ):
        Cache.open(cache.path).read_shard(0, "original")
    large = np.zeros_like(sizes)
    large[0] = sizes.sum()
    rewrite_row(cache, "original/sizes", 0, large)
    with pytest.raises(CorruptShardError, match="group sizes above 20"):
        Cache.open(cache.path).read_shard(0, "original")


def test_a_class_out_of_range_is_refused(cache: Cache) -> None:
    indices = cache.read_shard(0, "original").indices.copy()
    indices[7] = 50
    rewrite_row(cache, "original/indices", 0, indices)
    with pytest.raises(CorruptShardError, match="indices/c/0/0: class 50 of 50 classes"):
        Cache.open(cache.path).read_shard(0, "original")


def forge_packed(path: Path, change: Callable[[bytearray, bytearray], None]) -> None:
    """Change the first chunk and the index of a packed file, with correct checksums."""
    content = bytearray(path.read_bytes())
    index_bytes = 16 * 1 + 4
    chunk, index = content[: -index_bytes - 4], content[-index_bytes:-4]
    change(chunk, index)
    chunk += struct.pack("<I", google_crc32c.value(bytes(chunk)))
    index += struct.pack("<I", google_crc32c.value(bytes(index)))
    path.write_bytes(chunk + index)


def claim_gigabytes(chunk: bytearray, index: bytearray) -> None:
    chunk[4:8] = struct.pack("<I", 2**31 - 1)


def mark_absent(chunk: bytearray, index: bytearray) -> None:
    index[:] = b"\xff" * 16


def reach_outside(chunk: bytearray, index: bytearray) -> None:
    index[8:] = struct.pack("<Q", 1 << 40)


def start_late(chunk: bytearray, index: bytearray) -> None:
    index[:8] = struct.pack("<Q", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claim_gigabytes, "chunk 0 with forged sizes"),
        (mark_absent, "no chunk 0"),
        (reach_outside, "chunks outside the file"),
        (start_late, "chunks that overlap or leave gaps"),
    ],
)
def test_chunks_with_forged_sizes_are_refused_before_decoding(
    cache: Cache, change: Callable[[bytearray, bytearray], None], message: str
) -> None:
    path = cache.path / "original/indices/c/0/0"
    forge_packed(path, change)
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match=message):
        Cache.open(cache.path).read_shard(0, "original")


def test_a_bomb_in_a_plain_chunk_is_refused(cache: Cache) -> None:
    path = cache.path / "original/sizes/c/0/0"
    chunk = bytearray(path.read_bytes()[:-4])
    claim_gigabytes(chunk, bytearray())
    path.write_bytes(chunk + struct.pack("<I", google_crc32c.value(bytes(chunk))))
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match="chunk 0 with forged sizes"):
        Cache.open(cache.path).read_shard(0, "original")


def test_a_file_shorter_than_its_index_is_refused(cache: Cache) -> None:
    (cache.path / "original/indices/c/0/0").write_bytes(b"short")
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match="5 bytes, fewer than the 20 of its index"):
        Cache.open(cache.path).read_shard(0, "original")


@pytest.mark.parametrize(
    ("length", "message"),
    [(500_000, "bytes unpacked for 40 samples"), (200_000, "a record key of 200,000 bytes")],
)
def test_a_bomb_in_a_table_of_samples_is_refused(cache: Cache, length: int, message: str) -> None:
    """A few bytes on disk, one dictionary entry, of which each row would be a copy."""
    path = cache.path / "samples/000000.parquet"
    table = pq.read_table(path)
    table = table.set_column(1, table.schema.field("key"), pa.array(["k" * length] * 40))
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 20_000
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match=message):
        Cache.open(cache.path).read_samples(0)


def test_another_table_of_samples_is_refused(cache: Cache) -> None:
    first = cache.path / "samples/000000.parquet"
    (cache.path / "samples/000001.parquet").write_bytes(first.read_bytes())
    with pytest.raises(CorruptShardError, match=r"000001\.parquet: expected \d+ bytes"):
        cache.read_samples(1)
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match="its rows are not 40 to 79"):
        Cache.open(cache.path).samples()
    first.write_bytes(b"PAR1")
    rehash(cache.path)
    with pytest.raises(CorruptShardError, match="it cannot be decoded"):
        Cache.open(cache.path).samples()
