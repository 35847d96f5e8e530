from pathlib import Path
from typing import Any

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import open_records
from tests.storage.records.packs import payload, write_pack


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"expected a folder with train\.rec, a \.rec, .* got nothing"),
        (lambda path: path.write_text("x"), r"expected a folder with train\.rec, .* another file;"),
        (lambda path: path.mkdir(), r"expected a folder with train\.rec, .*, got no image"),
        (lambda path: write_pack(path, {}), r"records with images, got 0 records and no image"),
        (
            lambda path: write_pack(path, {0: payload([1, 1], b"")}),
            r"records with images, got 1 records and no image; name a pack with images",
        ),
    ],
)
def test_paths_without_records_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "data"
    make(path)
    with pytest.raises(ConfigError, match=message):
        open_records(path)
