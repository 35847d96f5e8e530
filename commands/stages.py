"""The two stages: ``gkd cache-teacher`` and ``gkd train-student``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gkd.commands.shared import (
    PATH,
    Resumable,
    as_json,
    cache_settings,
    chosen_centers,
    chosen_teacher,
    emit,
    licence_option,
    note_option,
    sort_option,
    target_options,
    teacher_options,
)
from gkd.storage.util.torchrun_env import all_cores, local_world_size, log_rank0, rank, world_size

if TYPE_CHECKING:
    from gkd.storage.records.open import Records
    from gkd.trainer.data.dataset import JoinedTargets, Order
    from gkd.trainer.dry_run import DryRun

NO_TARGETS = Path("-")


@click.command("cache-teacher", cls=Resumable)
@click.argument("source", metavar="RECORDS", type=PATH)
@click.argument("out", type=PATH)
@teacher_options
@click.option("--threshold", type=float, default=0.93, show_default=True)
@click.option("--group-temperature", type=float, default=1.0, show_default=True)
@target_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the draws.",
)
@click.option("--skip-corrupt", is_flag=True, help="Leave unreadable records out, and say which.")
@licence_option
@note_option
@sort_option
@as_json
def cache_teacher(source: Path, out: Path, sort: Any, as_json: bool, **options: Any) -> None:
    """Run the teacher over RECORDS once and store its primary groups in OUT, or go on with it."""
    from gkd.pipeline.run import cache_teacher as run
    from gkd.storage.records.open import open_records

    settings = cache_settings(options)
    records = open_records(source, sort=sort)
    embedder = chosen_teacher(options)
    centers = chosen_centers(options["centers"], records, embedder)
    summary = run(records, out, embedder, centers, settings)
    if rank() == 0:
        speed = {"images_per_second": summary.images_per_second}
        emit({**msgspec.to_builtins(summary), **speed}, as_json)


@click.command("train-student", cls=Resumable)
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
    from gkd.storage.cache.reader import Cache
    from gkd.storage.records.open import ParquetRecords, open_records
    from gkd.trainer.compiling import require_compiler
    from gkd.trainer.config import load_config
    from gkd.trainer.data.dataset import join_targets
    from gkd.trainer.device import choose_device
    from gkd.trainer.distributed import joined_ranks
    from gkd.trainer.dry_run import dry_run
    from gkd.trainer.loop import train
    from gkd.trainer.report.page import REPORT

    chosen = [f"student.name={student}"] if student else []
    chosen += ["kd.enabled=false"] if without_kd else []
    run = load_config(config, [*settings, *chosen])

    def load(order: "Order") -> "tuple[Records, JoinedTargets | None]":
        records = open_records(source, sort=sort)
        if isinstance(records, ParquetRecords):
            log_rank0(
                f"{source}: a shuffled read of Parquet decodes up to {records.group_rows:,} images "
                f"beside its own; `gkd records pack {source} PACK` once and train on PACK, which "
                "the same targets serve"
            )
        if path == NO_TARGETS:
            return records, None
        # Without distillation as well: both runs leave out what the cache left out.
        records, joined = join_targets(
            records,
            Cache.open(path),
            workers=all_cores(),
            drop_unmatched=drop_unmatched,
            order=order,
        )
        if joined.unmatched:
            left = f"{joined.unmatched:,} images without targets are left out"
            log_rank0(f"{left}, {len(records):,} stay")
        return records, joined

    if dry:
        if rank() == 0:
            emit_dry_run(dry_run(run, *load("blocks"), world_size=world_size()), as_json)
        return
    device = choose_device(run.train.device)
    # Before the data is made ready, which may take one node far longer than another.
    with joined_ranks(device.type) as ranks:
        if run.train.compile:
            ranks.together(lambda: require_compiler(device))
        # Where no target is read, none need be made ready.
        records, joined = ranks.together(
            lambda: load(run.data.order if run.kd.enabled else "blocks")
        )
        summary = train(run, records, joined, out, command=own_command(), ranks=ranks)
    if ranks.first:
        emit(summary, as_json)
        click.echo(f"see {out / REPORT}", err=True)


def own_command() -> list[str]:
    """What was typed to start this process, as far as a rank can know what torchrun was told."""
    typed = sys.argv[1:]
    if world_size() == 1:
        return ["gkd", *typed]
    each = local_world_size()
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
