"""Face records of any kind, opened by their path."""

from pathlib import Path

from gkd.storage.errors import ConfigError
from gkd.storage.records.base import FORMS, Records
from gkd.storage.records.folder import ImageFolder, Sort, natural_key
from gkd.storage.records.multi_file import find_shards
from gkd.storage.records.pack import RecordFile, RecordParts
from gkd.storage.records.parquet import PARQUET, ParquetRecords
from gkd.storage.records.webdataset import TAR, WebDatasetRecords

_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_records(path: str | Path, *, sort: Sort = "natural") -> Records:
    """Open a pack, Parquet files, tar shards or an image folder, whichever ``path`` is.

    The form of a file follows from its suffix: ``.rec``, ``.parquet`` or ``.tar``. A folder is the
    first of: its ``train.rec``; its other packs, in natural order of their names, as parts of one
    data set with one numbering of the identities; its ``.tar`` files; its ``.parquet`` files (both
    also in its folder ``data``); its folders of images, one per identity. ``sort`` orders the
    identities of an image folder; the other forms store labels.

    Raises:
        ConfigError: if ``path`` is none of these, or holds no image.
        CorruptRecordError: if an index cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "train.rec").exists():
            return RecordFile(path / "train.rec")
        packs = sorted(path.glob("*.rec"), key=lambda part: natural_key(part.name))
        if packs:
            return RecordFile(packs[0]) if len(packs) == 1 else RecordParts(packs)
        if find_shards(path, TAR):
            return WebDatasetRecords(path)
        if find_shards(path, PARQUET):
            return ParquetRecords(path)
        for suffix in _COMPRESSED_TAR:
            if compressed := find_shards(path, suffix):
                return WebDatasetRecords(compressed[0])  # raises what is wrong with it
        return ImageFolder(path, sort=sort)
    if path.is_file():
        if path.suffix == ".rec":
            return RecordFile(path)
        if path.suffix == PARQUET:
            return ParquetRecords(path)
        if path.name.endswith((TAR, *_COMPRESSED_TAR)):
            return WebDatasetRecords(path)
    found = "another file" if path.exists() else "nothing there"
    raise ConfigError(f"{path}: expected {FORMS}, got {found}; name one of these")
