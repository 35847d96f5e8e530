"""The label-noise report: three tables for further work and a page with the faces.

The page is self-contained: its items are HTML, the faces are one block of JSON, and its own script
shows a few items at a time with their faces. Without scripts it lists all items, without faces.
"""

import base64
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.analysis.confusions import confusions, examples
from gkd.storage.analysis.thumbnails import thumbnails
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.util.files import disk_errors, write_file
from gkd.storage.util.html import render

PAGE = "confusions.html"
EXAMPLES = 3  # faces of an identity beside an image


def write_confusions(
    cache: Cache, out: Path, *, records: Records | None, max_items: int, folder: Path, workers: int
) -> dict[str, Any]:
    """Write ``identities``, ``label_noise`` and ``hard`` ``.parquet`` and the page into ``out``.

    The columns are those of ``Confusions``. The page shows the first ``max_items`` of each table,
    with faces from ``records`` if given; ``folder`` caches their digests. Existing files of these
    names are replaced.

    Returns the paths, the rows of each table, the samples, and the faces on the page and missing
    from the records; ``left_out`` is that of ``Confusions``.

    Raises:
        ConfigError: if ``out`` is not a folder, is inside a cache, or cannot be written to.
        IncompleteCacheError: if the cache is not finished.
        CorruptShardError: if the cache is damaged.
        SpecMismatchError: if the records contain none of the images.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder to write to, got a file; name another")
    require_outside_caches(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    found = confusions(cache)
    spec, skipped = cache.spec, int((~found.samples.present).sum())
    tables = {
        "identities": found.identities,
        "label_noise": found.label_noise,
        "hard": found.hard,
    }
    pairs, noise, hard = (table.slice(0, max_items).to_pylist() for table in tables.values())

    # Classes that the page shows, each with the image beside which its examples are shown.
    classes = [(item[column], None) for item in pairs for column in ("a", "b")]
    classes += [(item["label"], item["row"]) for item in (*noise, *hard)]
    classes += [(item["other"], None) for item in noise]
    classes += [(item["likeliest"], None) for item in hard]
    # One more than is shown, as an image is not shown beside itself.
    best = examples(found.samples.labels, found.own, [label for label, _ in classes], EXAMPLES + 1)

    def examples_beside(label: int, image: int | None) -> list[int]:
        return [row for row in best[label] if row != image][:EXAMPLES]

    beside = sorted({row for label, image in classes for row in examples_beside(label, image)})
    rows = {item["row"] for item in (*noise, *hard)}.union(beside)
    faces = {}
    if records is not None:
        faces = thumbnails(records, found.samples, rows, folder, workers=workers)
    page = render(
        Path(__file__).with_suffix(".html"),
        cache=cache,
        spec=spec,
        pairs=pairs,
        noise=noise,
        hard=hard,
        examples_beside=examples_beside,
        keys=dict(zip(beside, found.samples.keys(beside), strict=True)),
        faces=faces,
        encoded_faces={str(row): base64.b64encode(jpeg).decode() for row, jpeg in faces.items()},
        origin={
            "Cache": str(cache.path),
            "Cache id": cache.id,
            "Teacher": f"{spec.teacher.name}, {spec.teacher.arch}, sha256 {spec.teacher.sha256}",
            "Centres": f"{spec.centers.kind}, sha256 {spec.centers.sha256}",
            "Data set fingerprint": spec.dataset.fingerprint,
            "Samples skipped": f"{skipped:,}",
            "Left out of any pair's figures, at most": f"{found.left_out:.3g}",
        },
    )
    with disk_errors(out):
        for name, table in tables.items():
            write_file(out / f"{name}.parquet", _parquet(table))
        write_file(out / PAGE, page)
    return {
        "out": out,
        "page": out / PAGE,
        "samples": len(found.samples),
        "skipped": skipped,
        **{name: len(table) for name, table in tables.items()},
        "faces": len(faces),
        "faces_missing": len(rows) - len(faces) if records is not None else 0,
        "left_out": found.left_out,
    }


def _parquet(table: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()
