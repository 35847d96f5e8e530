"""``gkd train-student``: stage two."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gkd.commands.builders import note_older_pixels, open_faces
from gkd.commands.options import LOCAL_PATH, Resumable, as_json, sort_option
from gkd.commands.output import echo, emit, emit_lines
from gkd.storage.util.torchrun_env import all_cores, local_world_size, log_rank0, rank, world_size

if TYPE_CHECKING:
    from gkd.storage.records.base import Records
    from gkd.trainer.data.dataset import JoinedTargets, Order
    from gkd.trainer.dry_run import DryRun


@click.command("train-student", cls=Resumable, short_help="Train a student from cached targets.")
@click.argument("paths", metavar="RECORDS [TARGETS] OUT", type=LOCAL_PATH, nargs=-1, required=True)
@click.option("--config", type=LOCAL_PATH, help="TOML file with the settings of the run.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one setting, e.g. train.epochs=10; may be repeated.",
)
@click.option("--student", help="Student network, the same as --set student.name=NAME.")
@click.option("--without-kd", is_flag=True, help="Train with cross-entropy alone.")
@click.option(
    "--drop-unmatched", is_flag=True, help="Leave out images that TARGETS do not contain."
)
@click.option(
    "--cache-id",
    metavar="ID",
    help="Train from the cache of this id only (`gkd targets info` prints it), the same as --set "
    "data.cache_id=ID.",
)
@click.option(
    "--dry-run", "dry", is_flag=True, help="Print parameters, memory and steps; train nothing."
)
@sort_option
@as_json
def train_student(
    paths: tuple[Path, ...],
    config: Path | None,
    settings: tuple[str, ...],
    student: str | None,
    without_kd: bool,
    drop_unmatched: bool,
    cache_id: str | None,
    dry: bool,
    sort: Any,
    as_json: bool,
) -> None:
    """Train a student on RECORDS from the cache TARGETS into the run folder OUT.

    TARGETS may be omitted with --without-kd. An interrupted run resumes when the same command is
    run again. Several GPUs or nodes: torchrun --nproc-per-node N -m gkd.cli train-student ...;
    train.batch_size counts the images of all ranks.
    """
    from gkd.trainer.config_file import load_config
    from gkd.trainer.device import choose_device, require_compiler
    from gkd.trainer.distributed import joined_ranks
    from gkd.trainer.dry_run import dry_run
    from gkd.trainer.loop import train
    from gkd.trainer.report.page import REPORT

    chosen = [f"student.name={student}"] if student else []
    chosen += ["kd.enabled=false"] if without_kd else []
    chosen += [f"data.cache_id={json.dumps(cache_id)}"] if cache_id is not None else []
    run = load_config(config, [*settings, *chosen])
    source, targets, out = _split_paths(paths, needs_targets=run.kd.enabled)
    if cache_id is not None and (targets is None or not cache_id.strip()):
        raise click.UsageError(
            "--cache-id: expected TARGETS and the id of a cache, got none; is a shell variable "
            "unset?"
        )

    def load(order: "Order") -> "tuple[Records, JoinedTargets | None]":
        agreed = run.data.cache_id
        return _load(source, targets, agreed, sort=sort, drop_unmatched=drop_unmatched, order=order)

    if dry:
        if rank() == 0:
            emit_dry_run(dry_run(run, *load("blocks"), world_size=world_size()), as_json)
        return
    device = choose_device(run.train.device)
    # Join first: preparing the data may take one node far longer than another.
    with joined_ranks(device.type) as ranks:
        if run.train.compile:
            ranks.run_all_or_abort(lambda: require_compiler(device))
        # Targets that are not read need not be materialised.
        order = run.data.order if run.kd.enabled else "blocks"
        records, joined = ranks.run_all_or_abort(lambda: load(order))
        summary = train(run, records, joined, out, command=own_command(), ranks=ranks)
    if ranks.first:
        emit(summary, as_json)
        echo(f"see {out / REPORT}", err=True)


def _split_paths(paths: tuple[Path, ...], *, needs_targets: bool) -> tuple[Path, Path | None, Path]:
    """RECORDS, TARGETS and OUT; ``-`` for TARGETS is accepted as their absence."""
    if not 2 <= len(paths) <= 3:
        raise click.UsageError(f"expected RECORDS [TARGETS] OUT, got {len(paths)} paths")
    targets = paths[1] if len(paths) == 3 and paths[1] != Path("-") else None
    if targets is None and needs_targets:
        raise click.UsageError(
            "TARGETS are missing; give RECORDS TARGETS OUT, or --without-kd to train without them"
        )
    return paths[0], targets, paths[-1]


def _load(
    source: Path,
    targets: Path | None,
    agreed: str,
    *,
    sort: Any,
    drop_unmatched: bool,
    order: "Order",
) -> "tuple[Records, JoinedTargets | None]":
    from gkd.storage.cache.reader import Cache
    from gkd.storage.records.parquet import ParquetRecords
    from gkd.trainer.data.checks import require_agreed_cache
    from gkd.trainer.data.dataset import join_targets

    cache = None if targets is None else Cache.open(targets)
    if cache is not None:
        note_older_pixels(cache)
        require_agreed_cache(agreed, cache.id, cache.path)
    records = open_faces(source, sort)
    if isinstance(records, ParquetRecords):
        log_rank0(
            f"{source}: each shuffled read of Parquet decodes up to {records.group_rows:,} images; "
            f"run `gkd records pack {source} PACK` once and train on PACK with the same targets"
        )
    if cache is None:
        return records, None
    # Without distillation too: both runs leave out the images that the cache skipped.
    records, joined = join_targets(
        records,
        cache,
        workers=all_cores(),
        drop_unmatched=drop_unmatched,
        order=order,
    )
    if joined.unmatched:
        log_rank0(
            f"{joined.unmatched:,} images without targets are left out, {len(records):,} remain"
        )
    return records, joined


def own_command() -> list[str]:
    """The command line that started this process, as far as one rank can know it."""
    arguments = sys.argv[1:]
    if world_size() == 1:
        return ["gkd", *arguments]
    per_node = local_world_size()
    nodes = world_size() // per_node
    launcher = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
    return [*launcher, f"--nproc-per-node={per_node}", "-m", "gkd.cli", *arguments]


def emit_dry_run(result: "DryRun", as_json: bool) -> None:
    """Print the cost of a training: one JSON object, or one line per part."""
    if as_json:
        emit(result, as_json)
        return
    of_rank = "" if result.ranks == 1 else f" of one of {result.ranks} ranks"
    memory = {
        f"memory{of_rank}, {name.replace('_', ' ')}": _mib(size)
        for name, size in result.memory.items()
    }
    emit_lines(
        {
            "images": f"{result.images:,} of {result.classes:,} classes",
            "steps": (
                f"{result.total_steps:,}: {result.epochs:,} epochs of {result.steps_per_epoch:,}"
            ),
            **{f"parameters, {name}": f"{n:,}" for name, n in result.parameters.items()},
            "FLOPs per image": f"{result.flops_per_image / 1e9:,.3f} G, forward",
            "FLOPs per step": f"{result.flops_per_step / 1e12:,.3f} T, forward and backward",
            "precision": result.precision,
            **memory,
            f"memory{of_rank} in total": _mib(result.memory_total),
            f"shared memory{of_rank}": f"{_mib(result.shared_memory)} of /dev/shm",
            "targets": f"{_mib(result.targets_bytes)}, {result.targets_held}",
        }
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
