"""Face records of any kind, opened by their path."""

from pathlib import Path

from gkd.storage.errors import ConfigError
from gkd.storage.folders import ImageFolder, Sort, natural_key
from gkd.storage.images import digest
from gkd.storage.record_file import RecordFile
from gkd.storage.record_parts import RecordParts
from gkd.storage.rows import Records, digests

__all__ = [
    "ImageFolder",
    "RecordFile",
    "RecordParts",
    "Records",
    "Sort",
    "digest",
    "digests",
    "open_records",
]


def open_records(path: str | Path, *, sort: Sort = "natural") -> Records:
    """Open a folder with ``train.rec``, a ``.rec`` file, or a folder with one folder an identity.

    A folder without ``train.rec`` and with other packs is all of them, in natural order of their
    names: parts of one data set, with one numbering of the identities.
    ``sort`` orders the identities of an image folder; packs carry their own labels.

    Raises:
        ConfigError: where ``path`` is none of these, or holds no image.
        CorruptRecordError: where a pack's index cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        pack = path / "train.rec"
        if pack.exists():
            return RecordFile(pack)
        packs = sorted(path.glob("*.rec"), key=lambda part: natural_key(part.name))
        match packs:
            case []:
                return ImageFolder(path, sort=sort)
            case [alone]:
                return RecordFile(alone)
            case _:
                return RecordParts(packs)
    if path.is_file() and path.suffix == ".rec":
        return RecordFile(path)
    got = "another file" if path.exists() else "nothing there"
    raise ConfigError(
        f"{path}: expected a folder with train.rec, a .rec file, or a folder with "
        f"one folder of images an identity, got {got}; name one of these"
    )
