from pathlib import Path
from typing import Any

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import open_records
from tests.storage.records.packs import jpeg, payload, write_pack


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


def write_named(folder: Path, name: str) -> None:
    pack = write_pack(folder / "new", {0: payload(0, jpeg(0)), 1: payload(1, jpeg(1))})
    for suffix in (".rec", ".idx"):
        pack.with_suffix(suffix).rename(folder / f"{name}{suffix}")


def test_packs_of_other_splits_are_left_out_and_named(tmp_path: Path) -> None:
    for name in ("casia_train", "casia_val", "casia_test"):
        write_named(tmp_path, name)
    records = open_records(tmp_path)
    assert records.path.name == "casia_train.rec"
    assert records.left_out == ["2 files of other splits: casia_test.rec, casia_val.rec"]


def test_packs_beside_train_rec_are_named(tmp_path: Path) -> None:
    for name in ("train", "more"):
        write_named(tmp_path, name)
    assert open_records(tmp_path).left_out == ["1 packs beside train.rec: more.rec"]
