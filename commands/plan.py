"""``gkd plan``: what a cache will cost, before it is made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gkd.commands.shared import (
    PATH,
    arch_option,
    as_json,
    bgr_option,
    build_embedder,
    chosen_centers,
    device_option,
    emit,
    parse_names,
    parse_numbers,
    precision_option,
    preprocess_option,
    require_plot,
    sort_option,
    workers_option,
)

if TYPE_CHECKING:
    from gkd.pipeline.teacher import Precision


@click.command("plan")
@click.argument("source", metavar="RECORDS", type=PATH)
@click.option("--teacher", type=PATH, required=True, help="ONNX file, weights or run folder.")
@arch_option
@click.option(
    "--centers",
    required=True,
    multiple=True,
    metavar="FILE|class-mean",
    help="Class centres [C, D], or the mean of each class, as cache-teacher takes them.",
)
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
@click.option("--temperatures", callback=parse_numbers, default="1,2,4", show_default=True)
@click.option("--max-group", type=int, default=4096, show_default=True)
@click.option("--scale", type=float, default=64.0, show_default=True)
@click.option("--margin", type=float, default=0.4, show_default=True)
@click.option(
    "--draws", type=click.IntRange(min=0), default=0, show_default=True, help="Classes to draw."
)
@click.option("--draw-temperature", type=float, default=4.0, show_default=True)
@click.option(
    "--draw-from", type=click.Choice(["all", "primary"]), default="all", show_default=True
)
@click.option("--views", callback=parse_names, default="original,flipped", show_default=True)
@preprocess_option
@bgr_option
@click.option("--batch-size", type=int, default=128, show_default=True)
@device_option
@precision_option
@workers_option
@click.option("--shard-samples", type=int, help="Samples a shard; by default from --max-group.")
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
    from gkd.pipeline.run import CacheSettings
    from gkd.pipeline.settings import PartitionSettings
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
