"""``gkd plan``: what a cache will cost, before it is made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gkd.commands.shared import (
    PATH,
    as_json,
    build_embedder,
    chosen_centers,
    emit,
    parse_numbers,
    require_plot,
    sort_option,
    target_options,
    teacher_options,
)

if TYPE_CHECKING:
    from gkd.pipeline.teacher import Precision


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
@click.option("--plot", type=PATH, help="Draw group and cache sizes into this PNG.")
@sort_option
@as_json
def plan(
    source: Path,
    teacher: Path,
    arch: str,
    centers: tuple[str, ...],
    samples: int,
    group_temperatures: tuple[float, ...],
    thresholds: tuple[float, ...],
    temperatures: tuple[float, ...],
    max_group: int,
    scale: float,
    margin: float,
    draws: int,
    draw_temperature: float,
    draw_from: Literal["all", "primary"],
    views: Any,
    preset: str,
    bgr: bool,
    batch_size: int,
    device: str,
    precision: "Precision",
    workers: int,
    shard_samples: int | None,
    plot: Path | None,
    sort: Any,
    as_json: bool,
) -> None:
    """Run the teacher on a sample of RECORDS; say what groups and what cache each setting gives.

    A row for each group temperature and threshold: group sizes, the probability that groups hold,
    how many --max-group cuts, bytes an image and in all, and the time of cache-teacher on this
    device and on several. Nothing is kept.
    """
    from rich.console import Console

    from gkd.pipeline.plan import PlanSettings
    from gkd.pipeline.plan import plan as run
    from gkd.pipeline.plan_show import plan_table, plot_plan
    from gkd.pipeline.settings import CacheSettings, PartitionSettings
    from gkd.storage.records import open_records
    from gkd.storage.spec import DrawsSpec, preprocess_preset

    if plot:
        require_plot(plot)
    settings = PlanSettings(
        cache=CacheSettings(
            partition=PartitionSettings(
                temperatures=temperatures,
                max_group=max_group,
                scale=scale,
                margin=margin,
                draws=DrawsSpec(draws, draw_temperature, draw_from) if draws else None,
            ),
            views=views,
            batch_size=batch_size,
            workers=workers,
            shard_samples=shard_samples,
        ),
        samples=samples,
        group_temperatures=group_temperatures,
        thresholds=thresholds,
    )
    records = open_records(source, sort=sort)
    preprocess = preprocess_preset(preset, bgr=bgr)
    embedder = build_embedder(
        teacher, arch=arch, preprocess=preprocess, device=device, precision=precision
    )
    made = run(records, embedder, chosen_centers(centers, records, embedder), settings)
    if plot:
        plot_plan(made, plot)
    if as_json:
        emit(made, as_json)
        return
    Console().print(plan_table(made))
    for line in made.basis:
        click.echo(line)
