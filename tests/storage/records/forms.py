"""Published forms of small data sets, written by pyarrow and by the standard library's tarfile."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gkd.storage.records.base import Records
from tests.storage.records.packs import jpeg

Members = Iterable[tuple[str, bytes]]
LABELS = [1, 0, 2, 1, 1, 0, 2, 0]
BODIES = [jpeg(seed) for seed in range(8)]


def bodies(records: Records) -> list[bytes]:
    return [bytes(records.encoded(row)) for row in range(len(records))]


def write_tar(path: Path, members: Members, *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels: Sequence[int], bodies: Sequence[bytes], first: int = 0) -> Members:
    """Image and label of each, named as WebDataset's writer does."""
    for number, (label, body) in enumerate(zip(labels, bodies, strict=True), first):
        yield f"{number:09}.jpg", body
        yield f"{number:09}.cls", str(label).encode()


def image_column(bodies: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> Any:
    """The struct of ``datasets``' feature Image."""
    return pa.array(
        [
            None if body is None and path is None else {"bytes": body, "path": path}
            for body, path in zip(bodies, paths or [None] * len(bodies), strict=True)
        ],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )


def features(**columns: object) -> dict[bytes, bytes]:
    """Metadata of a schema as ``datasets`` writes them."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


IMAGE = {"_type": "Image"}


def class_label(*names: str) -> dict[str, object]:
    return {"names": list(names), "_type": "ClassLabel"}


def write_parquet(
    path: Path,
    columns: dict[str, Any],
    *,
    metadata: dict[bytes, bytes] | None = None,
    group_rows: int = 3,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=group_rows, **options)
    return path
