from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.records.multi_file import Shards, find_shards


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["b-10.tar", "b-9.tar", "A-11.tar", "x.txt", ".hidden.tar"], ["A-11", "b-9", "b-10"]),
        (["train-0.tar", "test-0.tar", "validation-0.tar", "extra.tar"], ["extra", "train-0"]),
        (["faces_train_1.tar", "faces_val_1.tar", "dev.tar"], ["faces_train_1"]),
        (["latest.tar", "devon.tar", "contest-1.tar"], ["contest-1", "devon", "latest"]),
        (["test-0.tar", "test-1.tar"], ["test-0", "test-1"]),
    ],
)
def test_files_are_in_natural_order_without_test_splits(
    tmp_path: Path, names: list[str], kept: list[str]
) -> None:
    found = find_shards(touch(tmp_path, *names), ".tar")[0]
    assert [path.stem for path in found] == kept


def test_the_sub_folder_data_is_searched(tmp_path: Path) -> None:
    touch(tmp_path / "data", "train-00000-of-00001.parquet")
    assert [path.parent.name for path in find_shards(tmp_path, ".parquet")[0]] == ["data"]
    touch(tmp_path, "own.parquet")
    assert [path.name for path in find_shards(tmp_path, ".parquet")[0]] == ["own.parquet"]
    assert find_shards(tmp_path, ".tar") == ([], [])


def test_missing_numbered_files_are_reported(tmp_path: Path) -> None:
    names = [f"train-{number:05}-of-00007-abc.parquet" for number in (0, 1, 4)]
    touch(tmp_path, *names, "test-00001-of-00002.parquet", "notes-of-3.parquet")
    message = r"expected 7 files train-\*-of-00007 .*, got 3; missing: 2, 3, 5 and 1 more; fetch"
    with pytest.raises(ConfigError, match=message):
        Shards(tmp_path, ".parquet")
    # A single file can be named.
    assert len(Shards(tmp_path / names[1], ".parquet").paths) == 1
    touch(tmp_path, *(f"train-{number:05}-of-00007-abc.parquet" for number in (2, 3, 5, 6)))
    assert len(Shards(tmp_path, ".parquet").paths) == 8


def test_keys_name_their_file_if_there_are_several(tmp_path: Path) -> None:
    shards = Shards(touch(tmp_path / "set", "a.tar", "b.tar", "c.tar"), ".tar")
    assert (shards.name, shards.key(2, "k")) == ("set", "c/k")


@pytest.mark.parametrize(("file", "name"), [("train.tar", "set"), ("faces.tar", "faces")])
def test_a_single_file_names_the_data_set(tmp_path: Path, file: str, name: str) -> None:
    folder = touch(tmp_path / "set", file)
    (folder / "property").write_text("7,112,112\n")
    shards = Shards(folder / file, ".tar")
    assert (shards.name, shards.key(0, "k"), shards.num_classes) == (name, "k", 7)
