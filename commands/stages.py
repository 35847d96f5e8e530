"""The two stages: ``gkd cache-teacher`` and ``gkd train-student``."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from gkd.commands.shared import (
    PATH,
    as_json,
    build_embedder,
    chosen_centers,
    emit,
    licence_option,
    note_option,
    rank,
    sort_option,
    target_options,
    teacher_options,
    world_size,
)

if TYPE_CHECKING:
    from gkd.pipeline.teacher import Precision
    from gkd.storage.records import Records
    from gkd.storage.spec import CenterPrecision
    from gkd.trainer.data import JoinedTargets, Order
    from gkd.trainer.dry_run import DryRun

NO_TARGETS = Path("-")


@click.command("cache-teacher")
@click.argument("source", metavar="RECORDS", type=PATH)
@click.argument("out", type=PATH)
@teacher_options
@click.option("--threshold", type=float, default=0.93, show_default=True)
@click.option("--group-temperature", type=float, default=2.0, show_default=True)
@target_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option(
    "--center-precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the centres in memory; the run tells what half of it changes.",
)
@click.option("--compile", is_flag=True, help="torch.compile the teacher's network.")
@click.option("--skip-corrupt", is_flag=True, help="Leave unreadable records out, and say which.")
@licence_option
@note_option
@sort_option
@as_json
def cache_teacher(
    source: Path,
    out: Path,
    teacher: Path,
    arch: str,
    centers: tuple[str, ...],
    threshold: float,
    group_temperature: float,
    temperatures: tuple[float, ...],
    max_group: int,
    scale: float,
    margin: float,
    draws: int,
    draw_temperature: float,
    draw_from: Literal["all", "primary"],
    seed: int,
    views: Any,
    preset: str,
    bgr: bool,
    batch_size: int,
    device: str,
    precision: "Precision",
    center_precision: "CenterPrecision",
    compile: bool,
    workers: int,
    shard_samples: int | None,
    skip_corrupt: bool,
    licence: str | None,
    note: str | None,
    sort: Any,
    as_json: bool,
) -> None:
    """Run the teacher over RECORDS once and store its primary groups in OUT, or go on with it."""
    from gkd.pipeline.run import cache_teacher as run
    from gkd.pipeline.settings import CacheSettings, PartitionSettings
    from gkd.storage.records import open_records
    from gkd.storage.spec import DrawsSpec, preprocess_preset

    settings = CacheSettings(
        partition=PartitionSettings(
            threshold=threshold,
            group_temperature=group_temperature,
            temperatures=temperatures,
            max_group=max_group,
            scale=scale,
            margin=margin,
            draws=DrawsSpec(draws, draw_temperature, draw_from, seed) if draws else None,
        ),
        views=views,
        batch_size=batch_size,
        workers=workers,
        skip_corrupt=skip_corrupt,
        shard_samples=shard_samples,
        center_precision=center_precision,
        licence=licence,
        note=note,
    )
    records = open_records(source, sort=sort)
    preprocess = preprocess_preset(preset, bgr=bgr)
    embedder = build_embedder(
        teacher,
        arch=arch,
        preprocess=preprocess,
        device=device,
        precision=precision,
        compile=compile,
    )
    summary = run(records, out, embedder, chosen_centers(centers, records, embedder), settings)
    if rank() == 0:
        speed = {"images_per_second": summary.images_per_second}
        emit({**msgspec.to_builtins(summary), **speed}, as_json)


@click.command("train-student")
@click.argument("source", metavar="RECORDS", type=PATH)
@click.argument("path", metavar="TARGETS", type=PATH)
@click.argument("out", type=PATH)
@click.option("--config", type=PATH, help="Settings of the run, a TOML file with sections.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="One setting.")
@click.option("--student", help="Backbone, the same as --set student.name=...")
@click.option("--without-kd", is_flag=True, help="The same run with cross-entropy alone.")
@click.option("--drop-unmatched", is_flag=True, help="Leave out images that TARGETS do not know.")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Tell parameters, memory and steps; train nothing."
)
@sort_option
@as_json
def train_student(
    source: Path,
    path: Path,
    out: Path,
    config: Path | None,
    settings: tuple[str, ...],
    student: str | None,
    without_kd: bool,
    drop_unmatched: bool,
    dry: bool,
    sort: Any,
    as_json: bool,
) -> None:
    """Train a student on RECORDS from TARGETS into the run folder OUT, or go on with it.

    Where there are no TARGETS, write - for them, with --without-kd. On several GPUs or nodes:
    torchrun --nproc-per-node N -m gkd.cli train-student ...; train.batch_size is that of all ranks.
    """
    from gkd.storage.cache import Cache
    from gkd.storage.records import ParquetRecords, open_records
    from gkd.trainer.compiling import require_compiler
    from gkd.trainer.config import load_config
    from gkd.trainer.data import join_targets
    from gkd.trainer.devices import choose_device
    from gkd.trainer.dry_run import dry_run
    from gkd.trainer.loop import train
    from gkd.trainer.ranks import joined_ranks
    from gkd.trainer.report import REPORT

    chosen = [f"student.name={student}"] if student else []
    chosen += ["kd.enabled=false"] if without_kd else []
    run = load_config(config, [*settings, *chosen])

    def load(order: "Order") -> "tuple[Records, JoinedTargets | None]":
        records = open_records(source, sort=sort)
        if isinstance(records, ParquetRecords) and rank() == 0:
            click.echo(
                f"{source}: a shuffled read of Parquet decodes up to {records.group_rows:,} images "
                f"beside its own; `gkd records pack {source} PACK` once and train on PACK, which "
                "the same targets serve",
                err=True,
            )
        if path == NO_TARGETS:
            return records, None
        # Without distillation as well: both runs leave out what the cache left out.
        records, joined = join_targets(
            records,
            Cache.open(path),
            workers=os.cpu_count() or 1,
            drop_unmatched=drop_unmatched,
            order=order,
        )
        if joined.unmatched and rank() == 0:
            left = f"{joined.unmatched:,} images without targets are left out"
            click.echo(f"{left}, {len(records):,} stay", err=True)
        return records, joined

    if dry:
        if rank() == 0:
            emit_dry_run(dry_run(run, *load("blocks"), world_size=world_size()), as_json)
        return
    device = choose_device(run.train.device)
    # Before the data is made ready, which may take one node far longer than another.
    with joined_ranks(device.type) as ranks:
        if run.train.compile:
            require_compiler(device)
        # Where no target is read, none need be made ready.
        records, joined = load(run.data.order if run.kd.enabled else "blocks")
        summary = train(run, records, joined, out, command=own_command(), ranks=ranks)
    if ranks.first:
        emit(summary, as_json)
        click.echo(f"see {out / REPORT}", err=True)


def own_command() -> list[str]:
    """What was typed to start this process, as far as a rank can know what torchrun was told."""
    typed = sys.argv[1:]
    if world_size() == 1:
        return ["gkd", *typed]
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = world_size() // each
    launcher = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
    return [*launcher, f"--nproc-per-node={each}", "-m", "gkd.cli", *typed]


def emit_dry_run(told: "DryRun", as_json: bool) -> None:
    """Print what a training would cost: one JSON object, or a line a part."""
    if as_json:
        emit(told, as_json)
        return
    share = "" if told.ranks == 1 else f" of one of {told.ranks} ranks"
    lines = {
        "images": f"{told.images:,} of {told.classes:,} classes",
        "steps": f"{told.total_steps:,}: {told.epochs:,} epochs of {told.steps_per_epoch:,}",
        **{f"parameters, {name}": f"{count:,}" for name, count in told.parameters.items()},
        "FLOPs an image": f"{told.flops_per_image / 1e9:,.3f} G, forward",
        "FLOPs a step": f"{told.flops_per_step / 1e12:,.3f} T, forward and backward",
        "precision": told.precision,
        **{f"memory{share}, {name.replace('_', ' ')}": _mib(n) for name, n in told.memory.items()},
        f"memory{share} in all": _mib(told.memory_total),
        "targets": f"{_mib(told.targets_bytes)}, {told.targets_held}",
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        click.echo(f"{name:{width}}  {value}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
