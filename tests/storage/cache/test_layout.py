"""The bytes of format 1 are final: these hashes hold for every supported version of zarr."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.spec import CacheSpec, DrawsSpec
from gkd.storage.util.files import sha256_file
from tests.caches import make_spec

ROW_HASHES = {
    "indices": "8a838897d9f6934c352cbf438cc8088269c9983e883fe933ba7352bc3b285524",
    "log2_probs": "244558be270dbce58e92ec9c607605d3a029964e383ef3fa424fb36d6a922126",
    "sizes": "1615206e2dc5359f2fb40e5846e9b0c06969c987612d48b09011964047e76b75",
    "secondary": "fbbd162657ebcaf7e9094a1e3d28b89d52c5d996bb4f83dd07c62e5f07e57056",
    "draws": "d5054a67029baa794b55c3dde40c2522eb4c4e1b7b3ca8e65af9b73eb0169a81",
    "draw_log2_probs": "10e4478ce7cfbd69733780d3ac0d715d8a40a1a438dc772420d347b27aaa78d9",
    "draw_secondary": "3d57527a349287c562cbfd299fe64f5e98b63a28bbddd1187b0a5eeca042c1e4",
}
METADATA_HASHES = {
    "all": "a6979c37f16ed7a5b9c165111365a363c67397fa2874e8f971e4f539ca91ba5a",
    "primary": "c6ff69f5adddeb54acea0007c085698539a4446efef4c2779cb982599e3c2306",
}


def spec_of(source: Literal["all", "primary"]) -> CacheSpec:
    draws = DrawsSpec(4, 4.0, source)
    return make_spec(num_samples=9000, shard_samples=8000, max_group=30, draws=draws)


def test_rows_have_the_bytes_of_format_1(tmp_path: Path) -> None:
    found = {}
    for name, array in layout.arrays(spec_of("primary"), "original").items():
        # Three inner chunks and a part of one, or some of a row's samples.
        shape = (200_000,) if array.packed else (7000, *array.shape[2:])
        values = (np.arange(np.prod(shape)) * 2654435761 % 65521).astype(array.dtype)
        array.open(tmp_path, writable=True)[1, : shape[0]] = values.reshape(shape)
        found[name] = sha256_file(tmp_path / array.shard_file(1))
    assert found == ROW_HASHES


@pytest.mark.parametrize("source", ["all", "primary"])
def test_metadata_has_the_bytes_of_format_1(source: Literal["all", "primary"]) -> None:
    content = [
        f"{path}\n".encode() + layout.encode_json(value)
        for path, value in layout.metadata_files(spec_of(source))
    ]
    assert hashlib.sha256(b"".join(content)).hexdigest() == METADATA_HASHES[source]


def test_a_row_is_rounded_up_to_whole_inner_chunks() -> None:
    assert layout.packed_width(make_spec(shard_samples=1, max_group=1)) == 65536
    assert layout.packed_width(make_spec(shard_samples=65536, max_group=20)) == 65536 * 20
    assert layout.packed_width(make_spec(shard_samples=65537, max_group=1)) == 65536 * 2
