"""``gkd cache-teacher``: stage one."""

from pathlib import Path
from typing import Any

import click
import msgspec

from gkd.commands.builders import (
    cache_settings,
    centers_from_options,
    embedder_from_options,
    open_faces,
)
from gkd.commands.options import (
    LOCAL_PATH,
    Resumable,
    as_json,
    description_options,
    skip_corrupt_option,
    sort_option,
    target_options,
    teacher_options,
)
from gkd.commands.output import emit
from gkd.storage.util.torchrun_env import rank


@click.command("cache-teacher", cls=Resumable, short_help="Run a teacher once, store its targets.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@click.argument("out", type=LOCAL_PATH)
@teacher_options
@click.option(
    "--threshold",
    type=float,
    default=0.93,
    help="Probability that the primary group holds at least.",
)
@click.option(
    "--group-temperature",
    type=float,
    default=1.0,
    help="Temperature of the prediction that selects the primary group.",
)
@target_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Random seed of the draws.",
)
@skip_corrupt_option
@description_options
@sort_option
@as_json
def cache_teacher(source: Path, out: Path, sort: Any, as_json: bool, **options: Any) -> None:
    """Run the teacher over RECORDS once and store its targets in the cache OUT.

    An interrupted run resumes when the same command is run again. Several GPUs or nodes:
    torchrun --nproc-per-node N -m gkd.cli cache-teacher ...
    """
    from gkd.pipeline.run import cache_teacher as run

    settings = cache_settings(options)
    records = open_faces(source, sort)
    embedder = embedder_from_options(options["teacher"], options)
    centers = centers_from_options(options["centers"], records, embedder)
    summary = run(records, out, embedder, centers, settings)
    if rank() == 0:
        speed = {"images_per_second": summary.images_per_second}
        emit({**msgspec.to_builtins(summary), **speed}, as_json)
