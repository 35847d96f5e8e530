"""``gkd centers``: look at the class centres of a teacher, or make some."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from gkd.commands.shared import (
    PATH,
    Resumable,
    arch_option,
    as_json,
    batch_size_option,
    bgr_option,
    build_embedder,
    device_option,
    emit,
    precision_option,
    preprocess_option,
    sort_option,
    workers_option,
)

if TYPE_CHECKING:
    from gkd.storage.cache.spec import Precision


@click.group()
def centers() -> None:
    """Look at a teacher's class centres, or make some."""


@centers.command("info")
@click.argument("files", metavar="FILE...", type=PATH, nargs=-1, required=True)
@click.option("--records", "source", type=PATH, help="Hold their number against these RECORDS.")
@sort_option
@as_json
def centers_info(files: tuple[Path, ...], source: Path | None, sort: Any, as_json: bool) -> None:
    """Say what FILEs of class centres hold; parts, or the folder of them, are joined."""
    from gkd.pipeline.centers.files import read_center_files
    from gkd.pipeline.centers.load import describe_centers
    from gkd.storage.records.open import open_records

    records = None if source is None else open_records(source, sort=sort)
    emit(describe_centers(read_center_files(files), records), as_json)


@centers.command("build", cls=Resumable)
@click.argument("source", metavar="RECORDS", type=PATH)
@click.argument("out", metavar="OUT.safetensors", type=PATH)
@click.option("--teacher", type=PATH, required=True, help="ONNX file, weights or run folder.")
@arch_option
@preprocess_option
@bgr_option
@batch_size_option
@device_option
@precision_option
@workers_option
@click.option("--skip-corrupt", is_flag=True, help="Leave unreadable records out.")
@click.option(
    "--refine",
    "epochs",
    type=click.IntRange(min=1),
    metavar="EPOCHS",
    help="Train the class means on by a CosFace head over the frozen embeddings.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the order, with --refine.")
@sort_option
@as_json
def centers_build(
    source: Path,
    out: Path,
    teacher: Path,
    arch: str,
    preset: str,
    bgr: bool,
    batch_size: int | None,
    device: str,
    precision: 'Precision | Literal["auto"]',
    workers: int,
    skip_corrupt: bool,
    epochs: int | None,
    seed: int,
    sort: Any,
    as_json: bool,
) -> None:
    """Make class centres of RECORDS for a teacher that came without, or go on with it.

    They are the mean embeddings of both views of each identity's images, with --refine trained on.
    OUT says what it was made from, and --centers OUT of cache-teacher takes it for that alone.
    """
    from gkd.pipeline.centers.build import build_centers
    from gkd.pipeline.centers.refine import refine_settings
    from gkd.storage.cache.spec import preprocess_preset
    from gkd.storage.records.open import open_records

    records = open_records(source, sort=sort)
    embedder = build_embedder(
        teacher,
        arch=arch,
        preprocess=preprocess_preset(preset, bgr=bgr),
        device=device,
        precision=precision,
    )
    summary = build_centers(
        records,
        out,
        embedder,
        settings=None if epochs is None else refine_settings(epochs, seed),
        batch_size=batch_size,
        workers=workers,
        skip_corrupt=skip_corrupt,
    )
    emit(msgspec.to_builtins(summary), as_json)
