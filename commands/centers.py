"""``gkd centers``: inspect the class centres of a teacher, or build them."""

from pathlib import Path
from typing import Any

import click
import msgspec

from gkd.commands.builders import embedder_from_options, open_faces
from gkd.commands.options import (
    LOCAL_PATH,
    Resumable,
    as_json,
    embedder_options,
    skip_corrupt_option,
    sort_option,
)
from gkd.commands.output import emit


@click.group(short_help="Inspect or build a teacher's class centres.")
def centers() -> None:
    """Inspect or build a teacher's class centres."""


@centers.command("info", short_help="Describe files of class centres.")
@click.argument("files", metavar="FILE...", type=LOCAL_PATH, nargs=-1, required=True)
@click.option(
    "--records", "source", type=LOCAL_PATH, help="Compare their number with these records."
)
@sort_option
@as_json
def centers_info(files: tuple[Path, ...], source: Path | None, sort: Any, as_json: bool) -> None:
    """Describe FILEs of class centres; parts, or a folder of parts, are joined."""
    from gkd.pipeline.centers.files import read_center_files
    from gkd.pipeline.centers.load import describe_centers

    records = None if source is None else open_faces(source, sort)
    emit(describe_centers(read_center_files(files), records), as_json)


@centers.command("build", cls=Resumable, short_help="Build class means, optionally refined.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@click.argument("out", metavar="OUT.safetensors", type=LOCAL_PATH)
@embedder_options
@skip_corrupt_option
@click.option(
    "--refine",
    "epochs",
    type=click.IntRange(min=1),
    metavar="EPOCHS",
    help="Train the class means further with a CosFace head on the frozen embeddings.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Random seed of the training order with --refine.",
)
@sort_option
@as_json
def centers_build(
    source: Path,
    out: Path,
    epochs: int | None,
    seed: int,
    sort: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Build class centres of RECORDS for a teacher that was published without them.

    A centre is the mean embedding of both views of an identity's images. OUT records its teacher
    and data; cache-teacher --centers OUT refuses it for any other.
    """
    from gkd.pipeline.build_centers import build_centers
    from gkd.pipeline.centers.refine import refine_settings

    records = open_faces(source, sort)
    summary = build_centers(
        records,
        out,
        embedder_from_options(options["teacher"], options),
        settings=None if epochs is None else refine_settings(epochs, seed),
        batch_size=options["batch_size"],
        workers=options["workers"],
        skip_corrupt=options["skip_corrupt"],
    )
    emit(msgspec.to_builtins(summary), as_json)
