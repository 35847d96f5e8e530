"""``gkd plan``: the size, time and groups of a cache, before it is made."""

from pathlib import Path
from typing import Any

import click

from gkd.commands.builders import (
    cache_settings,
    centers_from_options,
    embedder_from_options,
    open_faces,
    require_plot,
)
from gkd.commands.options import (
    LOCAL_PATH,
    OUTPUT_PATH,
    as_json,
    parse_numbers,
    sort_option,
    target_options,
    teacher_options,
)
from gkd.commands.output import echo, emit


@click.command("plan", short_help="Forecast the size, time and groups of a cache.")
@click.argument("source", metavar="RECORDS", type=LOCAL_PATH)
@teacher_options
@click.option(
    "--samples",
    type=int,
    default=4096,
    help="Images to partition; with class means four times as many go through the teacher.",
)
@click.option(
    "--group-temperatures",
    callback=parse_numbers,
    default="1,2,4",
    help="Group temperatures to compare.",
)
@click.option(
    "--thresholds",
    callback=parse_numbers,
    default="0.8,0.9,0.93,0.95,0.99",
    help="Thresholds to compare.",
)
@target_options
@click.option("--plot", type=OUTPUT_PATH, help="Plot group and cache sizes into this PNG file.")
@sort_option
@as_json
def plan(
    source: Path,
    samples: int,
    group_temperatures: tuple[float, ...],
    thresholds: tuple[float, ...],
    plot: Path | None,
    sort: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the teacher on a sample of RECORDS and forecast the cache that each setting gives.

    Prints one row for each group temperature and threshold: group sizes, the probability they hold,
    how many are truncated, bytes per image and in total, and the time of cache-teacher on this
    device and on several. Nothing is stored.
    """
    from rich.console import Console

    from gkd.pipeline.plan.forecast import PlanSettings
    from gkd.pipeline.plan.forecast import plan as run
    from gkd.pipeline.plan.show import plan_table, plot_plan, verdict

    if plot:
        require_plot(plot)
    settings = PlanSettings(
        cache=cache_settings(options),
        samples=samples,
        group_temperatures=group_temperatures,
        thresholds=thresholds,
    )
    records = open_faces(source, sort)
    embedder = embedder_from_options(options["teacher"], options)
    centers = centers_from_options(options["centers"], records, embedder)
    result = run(records, embedder, centers, settings)
    if plot:
        plot_plan(result, plot)
    if as_json:
        emit(result, as_json)
        return
    Console().print(plan_table(result))
    draws = result.draws
    if draws:
        source_name = "all classes" if draws.source == "all" else "the primary group"
        echo(f"bytes include {draws.count} draws from {source_name} at T = {draws.temperature:g}")
    if line := verdict(result, settings.cache.partition):
        echo(line)
    for line in result.basis:
        echo(line)
