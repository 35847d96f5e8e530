"""``gkd plan``: what a cache will cost, before it is made."""

from pathlib import Path
from typing import Any

import click

from gkd.commands.shared import (
    OUT,
    PATH,
    as_json,
    cache_settings,
    chosen_centers,
    chosen_teacher,
    emit,
    parse_numbers,
    require_plot,
    sort_option,
    target_options,
    teacher_options,
)


@click.command("plan")
@click.argument("source", metavar="RECORDS", type=PATH)
@teacher_options
@click.option(
    "--samples",
    type=int,
    default=4096,
    show_default=True,
    help="Images whose groups are made; for class means four times as many go through the teacher.",
)
@click.option("--group-temperatures", callback=parse_numbers, default="1,2,4", show_default=True)
@click.option(
    "--thresholds", callback=parse_numbers, default="0.8,0.9,0.93,0.95,0.99", show_default=True
)
@target_options
@click.option("--plot", type=OUT, help="Draw group and cache sizes into this PNG.")
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
    """Run the teacher on a sample of RECORDS; say what groups and what cache each setting gives.

    A row for each group temperature and threshold: group sizes, the probability that groups hold,
    how many --max-group cuts, bytes an image and in all, and the time of cache-teacher on this
    device and on several. Nothing is kept.
    """
    from rich.console import Console

    from gkd.pipeline.plan.forecast import PlanSettings
    from gkd.pipeline.plan.forecast import plan as run
    from gkd.pipeline.plan.show import plan_table, plot_plan
    from gkd.storage.records.open import open_records

    if plot:
        require_plot(plot)
    settings = PlanSettings(
        cache=cache_settings(options),
        samples=samples,
        group_temperatures=group_temperatures,
        thresholds=thresholds,
    )
    records = open_records(source, sort=sort)
    embedder = chosen_teacher(options)
    made = run(records, embedder, chosen_centers(options["centers"], records, embedder), settings)
    if plot:
        plot_plan(made, plot)
    if as_json:
        emit(made, as_json)
        return
    Console().print(plan_table(made))
    draws = made.draws
    if draws:
        what = "all classes" if draws.source == "all" else "the primary group"
        click.echo(f"bytes include {draws.count} draws from {what} at T = {draws.temperature:g}")
    for line in made.basis:
        click.echo(line)
