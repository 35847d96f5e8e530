"""Face records of any kind, opened by their path."""

from pathlib import Path

from gkd.storage.errors import ConfigError
from gkd.storage.records.base import FORMS, Records
from gkd.storage.records.folder import ImageFolder, Sort
from gkd.storage.records.multi_file import find_shards
from gkd.storage.records.pack import RecordFile, RecordParts
from gkd.storage.records.parquet import PARQUET, ParquetRecords
from gkd.storage.records.webdataset import TAR, WebDatasetRecords
from gkd.storage.util.text import first_few

PACK = ".rec"
# Forms that are not read: what they are, ends of their files' names, and how to convert them.
_REPACK = "write its images as one folder per identity, or as a pack by MXNet's im2rec"
_OTHER_FORMS = (
    (
        "Arrow files of `datasets`",
        (".arrow",),
        "write them as Parquet, which is read: "
        "datasets.load_from_disk(FOLDER).to_parquet('train.parquet')",
    ),
    ("an LMDB database", ("data.mdb", ".lmdb"), _REPACK),
    ("TFRecord files", (".tfrecord", ".tfrecords"), _REPACK),
    ("an HDF5 file", (".h5", ".hdf5"), _REPACK),
    ("a bcolz array", (".blp", "__attrs__"), _REPACK),
    ("a list for im2rec", (".lst",), "run im2rec, and name the folder of the .rec file"),
    ("a verification set", (".bin",), "evaluate on it by `gkd evaluate`"),
    ("a zip archive", (".zip",), "unpack it"),
)
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
        packs, left_out = find_shards(path, PACK)
        if packs:
            return _open_packs(path, packs, left_out)
        if find_shards(path, TAR)[0]:
            return WebDatasetRecords(path)
        if find_shards(path, PARQUET)[0]:
            return ParquetRecords(path)
        for suffix in _COMPRESSED_TAR:
            if compressed := find_shards(path, suffix)[0]:
                return WebDatasetRecords(compressed[0])  # raises what is wrong with it
        try:
            return ImageFolder(path, sort=sort)
        except ConfigError:
            _refuse_other_forms([*path.iterdir(), *path.glob("*/*")])
            raise
    if path.exists():
        if path.suffix == PACK:
            return RecordFile(path)
        if path.suffix == PARQUET:
            return ParquetRecords(path)
        if path.name.endswith((TAR, *_COMPRESSED_TAR)):
            return WebDatasetRecords(path)
        _refuse_other_forms([path])
    found = "another file" if path.exists() else "nothing there"
    raise ConfigError(f"{path}: expected {FORMS}, got {found}; name one of these")


def _open_packs(folder: Path, packs: list[Path], left_out: list[str]) -> Records:
    train = folder / "train.rec"
    if train in packs:
        others = [pack.name for pack in packs if pack != train]
        if others:
            left_out = [*left_out, f"{len(others):,} packs beside train.rec: {first_few(others)}"]
        packs = [train]
    records = RecordFile(packs[0]) if len(packs) == 1 else RecordParts(packs)
    records.left_out = left_out
    return records


def _refuse_other_forms(paths: list[Path]) -> None:
    """Name a data set of a form that is not read, rather than its files."""
    for what, ends, remedy in _OTHER_FORMS:
        for path in paths:
            if path.name.lower().endswith(ends):
                raise ConfigError(path=path, expected=FORMS, got=what, remedy=remedy)
