"""Writes what a teacher confuses: three tables for further work, and a page to look at."""

import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.analysis.confusions import confusions, keys_of
from gkd.storage.analysis.confusions_html import confusion_page, shown_rows
from gkd.storage.analysis.thumbnails import thumbnails
from gkd.storage.cache.places import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.files import disk_errors, write_file

PAGE = "confusions.html"


@dataclass(frozen=True)
class Written:
    """What stands in ``out``: rows of each table, and faces on the page and missing there.

    left_out  what a pair's figures can lack because there were too many pairs
    """

    out: Path
    page: Path
    samples: int
    skipped: int
    identities: int
    label_noise: int
    hard: int
    faces: int
    faces_missing: int
    left_out: float


def write_confusions(
    cache: Cache, out: Path, *, records: Records | None, most: int, folder: Path, workers: int
) -> Written:
    """Write ``identities``, ``label_noise`` and ``hard`` ``.parquet`` and the page into ``out``.

    The columns are those of ``gkd.storage.analysis.confusions``. The page shows the first ``most``
    of each, with faces from ``records`` where there are some; ``folder`` keeps their digests. Files
    of these names that stand in ``out`` are replaced.

    Raises:
        ConfigError: where ``out`` is no folder, inside a cache, or cannot be written to.
        IncompleteCacheError: where the cache is not finished.
        CorruptShardError: where the cache is damaged.
        SpecMismatchError: where the records have none of the images.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder to write to, got a file; name another")
    require_outside_caches(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    found = confusions(cache)
    examples = shown_rows(found, most)
    beside = {row for rows in examples.values() for row in rows}
    keys = keys_of(found.samples, beside)
    shown = beside | {
        row
        for table in (found.label_noise, found.hard)
        for row in table["row"].slice(0, most).to_pylist()
    }
    faces = {}
    if records is not None:
        faces = thumbnails(records, found.samples, shown, folder, workers=workers)
    with disk_errors(out):
        write_file(out / "identities.parquet", _parquet(found.identities))
        write_file(out / "label_noise.parquet", _parquet(found.label_noise))
        write_file(out / "hard.parquet", _parquet(found.hard))
        write_file(out / PAGE, confusion_page(found, most, examples, keys, faces))
    return Written(
        out=out,
        page=out / PAGE,
        samples=len(found.samples),
        skipped=int((~found.samples.present).sum()),
        identities=len(found.identities),
        label_noise=len(found.label_noise),
        hard=len(found.hard),
        faces=len(faces),
        faces_missing=len(shown) - len(faces) if records is not None else 0,
        left_out=found.left_out,
    )


def _parquet(table: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()
