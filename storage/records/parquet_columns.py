"""Which columns of a Parquet file hold images and identities, by the conventions of hubs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gkd.storage.errors import ConfigError
from gkd.storage.records.classes import LABEL_NAMES

IMAGE_NAMES = ("image", "img", "face", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_BYTES = "bytes"


@dataclass(frozen=True)
class Columns:
    """The column of image bytes and that of labels.

    image  path of the bytes: ``image``, or ``image.bytes`` in a struct
    label  name of a column of whole numbers
    names  of the classes, in their order, where the file tells them
    """

    image: str
    label: str
    names: tuple[str, ...] | None


def find_columns(path: Path, schema: Any) -> Columns:
    """The columns of a file by the features that ``datasets`` writes into it, else by convention.

    An image is a column of bytes, or a struct with a field ``bytes``; a label is a column of whole
    numbers called as ``LABEL_NAMES`` say, or ``id`` where there is none of these.

    Raises:
        ConfigError: where there is no such column or more than one, naming all.
    """
    features = _features(schema)
    images = {field.name: where for field in schema if (where := _bytes_path(field)) is not None}
    named = _typed(features, "Image") or [n for n in images if n.lower() in IMAGE_NAMES]
    image = _only(
        path, "column of image bytes", schema, [n for n in named if n in images] or images
    )
    labels = _typed(features, "ClassLabel") or [
        field.name for field in schema if field.name.lower() in LABEL_NAMES
    ]
    label = _only(
        path,
        f"column of class numbers, called {', '.join(LABEL_NAMES)} or id",
        schema,
        labels or [field.name for field in schema if field.name.lower() == "id"],
    )
    kind = schema.field(label).type
    if not pa.types.is_integer(kind):
        raise ConfigError(
            f"{path}: expected whole numbers in the column {label}, got {kind}; write the numbers "
            'of the identities there (datasets: class_encode_column("...") makes them)'
        )
    names = features.get(label, {}).get("names")
    known = isinstance(names, list) and bool(names)
    return Columns(images[image], label, tuple(map(str, names or ())) if known else None)


def _only(path: Path, what: str, schema: Any, found: Sequence[str] | dict[str, str]) -> str:
    if len(found) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        got = " and ".join(found) or "none"
        raise ConfigError(
            f"{path}: expected one {what}, got {got} among {columns}; write the file again with "
            "one column so called"
        )
    return next(iter(found))


def _bytes_path(field: Any) -> str | None:
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        place = field.type.get_field_index(_BYTES)
        if place >= 0 and _is_bytes(field.type.field(place).type):
            return f"{field.name}.{_BYTES}"
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What ``datasets`` says of the columns; nothing where it wrote nothing that can be read."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _typed(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]
