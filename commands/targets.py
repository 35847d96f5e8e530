"""``gkd targets``: inspect, verify, share and derive caches of targets."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gkd.commands.builders import build_embedder, note_older_pixels, require_plot
from gkd.commands.options import (
    LOCAL_PATH,
    LOCATION,
    OUTPUT_PATH,
    AliasedOption,
    Resumable,
    as_json,
    description_options,
    device_option,
    parse_names,
    parse_numbers,
    parse_shards,
    sort_option,
    storage_option,
    workers_option,
)
from gkd.commands.output import echo, emit, emit_json
from gkd.storage.util.torchrun_env import usable_cores

if TYPE_CHECKING:
    from gkd.pipeline.checks.recompute import AgainstReport
    from gkd.storage.cache.verify import Level


@click.group(short_help="Inspect, verify, share and derive caches.")
def targets() -> None:
    """Inspect, verify, share and derive caches of targets."""


@targets.command("info", short_help="Describe a cache and what made it.")
@click.argument("location", metavar="TARGETS", type=LOCATION)
@storage_option
@as_json
def targets_info(location: str, options: dict[str, Any], as_json: bool) -> None:
    """Describe TARGETS, a local cache or one at an address, and what made it."""
    from gkd.storage.cache.metadata import committed_shards
    from gkd.storage.cache.reader import Cache
    from gkd.storage.sharing.remote import Remote, is_address
    from gkd.storage.sharing.remote_cache import RemoteCache

    if is_address(location):
        remote = RemoteCache.open(Remote(location, options))
        commits = remote.commits()
        state = {"address": remote.remote.address, "id": remote.id, "shards": len(commits)}
        state["bytes"] = remote.manifest.bytes
        spec = remote.spec
    else:
        cache = Cache.open(location, complete=False)
        commits = {shard: cache.commit(shard) for shard in committed_shards(cache.path)}
        state = {"path": cache.path, "id": cache.id if cache.manifest else "not finished"}
        state |= {"shards": cache.spec.num_shards, "committed_shards": len(commits)}
        spec = cache.spec
    skipped = {key: why for commit in commits.values() for key, why in commit.skipped.items()}
    emit(state | {"skipped": skipped} | msgspec.to_builtins(spec), as_json)


@targets.command("verify", short_help="Check every file of a cache, or recompute a sample.")
@click.argument("path", metavar="TARGETS", type=LOCAL_PATH)
@click.option("--quick", is_flag=True, help="Check presence and sizes only.")
@click.option("--deep", is_flag=True, help="Also decode all arrays and check their invariants.")
@click.option(
    "--against", type=LOCAL_PATH, metavar="RECORDS", help="Recompute a sample of these records."
)
@click.option("--teacher", type=LOCAL_PATH, help="The teacher to recompute with.")
@click.option("--arch", help="The teacher's network; by default the one that TARGETS name.")
@click.option(
    "--centers",
    "--centres",
    "centers",
    cls=AliasedOption,
    type=LOCAL_PATH,
    multiple=True,
    help="The teacher's class centres; class means are found beside TARGETS or computed again.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=256,
    help="Images to recompute.",
)
@click.option("--seed", type=int, help="Random seed of the sample; by default a new one each time.")
@device_option
@sort_option
@as_json
def targets_verify(
    path: Path,
    quick: bool,
    deep: bool,
    against: Path | None,
    teacher: Path | None,
    as_json: bool,
    **recompute: Any,
) -> None:
    """Check every file of TARGETS and list every fault; exit with 1 if there is one.

    By default every byte is checked against its hash. With --against RECORDS --teacher FILE a
    random sample is recomputed instead and the largest differences are printed.
    """
    from gkd.storage.cache.verify import verify

    if quick and deep:
        raise click.UsageError("--quick and --deep exclude each other; give one of them")
    if (against is None) != (teacher is None) or (against and (quick or deep)):
        raise click.UsageError("--against RECORDS and --teacher FILE go together, and alone")
    if against and teacher:
        compared = _verify_against(path, against, teacher, **recompute)
        ok = compared.ok
        fields = {**msgspec.to_builtins(compared), "ok": ok}
        if not as_json:
            fields |= {"drawn": str(compared.drawn), "first_drawn": str(compared.first_drawn)}
        emit(fields, as_json)
    else:
        level: Level = "quick" if quick else "deep" if deep else "hashes"
        report = verify(path, level=level)
        ok = report.ok
        if as_json:
            emit_json({**msgspec.to_builtins(report, enc_hook=str), "ok": ok})
        else:
            for fault in report.faults:
                echo(fault)
            echo(
                f"{report.shards:,} shards of {report.files:,} files, {report.bytes:,} bytes in "
                f"shards, {report.entries:,} entries, {len(report.faults):,} faults"
            )
    if not ok:
        raise SystemExit(1)


def _verify_against(
    path: Path,
    source: Path,
    teacher: Path,
    *,
    arch: str | None,
    centers: tuple[Path, ...],
    sample: int,
    seed: int | None,
    device: str,
    sort: Any,
) -> "AgainstReport":
    from gkd.pipeline.checks.recompute import named_centers, verify_against
    from gkd.storage.cache.reader import Cache
    from gkd.storage.errors import ConfigError
    from gkd.storage.records.open import open_records

    cache = Cache.open(path)
    note_older_pixels(cache)
    spec = cache.spec
    if ":" in spec.teacher.arch.removeprefix("onnx:") and arch is None:
        raise ConfigError(
            f"{path}: names the code {spec.teacher.arch} as its teacher's network, and code is "
            "never run because a cache names it; if you know and trust it, give --arch "
            f"{spec.teacher.arch} yourself"
        )
    arch = arch or spec.teacher.arch
    # An ONNX file in place of weights, or the reverse, is another teacher: its digest differs.
    torch_network = arch.partition(":")[0] != "onnx" and teacher.suffix != ".onnx"
    embedder = build_embedder(
        teacher,
        arch=arch if torch_network or teacher.suffix == ".onnx" else "auto",
        preprocess=spec.preprocess,
        device=device,
        precision=spec.precision if torch_network else "auto",
    )
    records, workers = open_records(source, sort=sort), usable_cores()
    return verify_against(
        cache,
        records,
        embedder,
        named_centers(cache, centers, records, embedder, workers=workers),
        sample=sample,
        seed=secrets.randbits(32) if seed is None else seed,
        workers=workers,
    )


@targets.command("stats", short_help="Group sizes, masses and bytes of a cache.")
@click.argument("location", metavar="TARGETS", type=LOCATION)
@click.option("--plot", type=OUTPUT_PATH, help="Plot group sizes and masses into this PNG file.")
@storage_option
@as_json
def targets_stats(location: str, plot: Path | None, options: dict[str, Any], as_json: bool) -> None:
    """Print group sizes, masses and bytes of TARGETS, a local cache or one at an address.

    The arrays of a cache at an address are not fetched: sizes and counts only.
    """
    from gkd.storage.analysis.stats import CacheStats, plot_stats, sizes, stats
    from gkd.storage.cache.reader import Cache
    from gkd.storage.errors import ConfigError
    from gkd.storage.sharing.remote import Remote, is_address
    from gkd.storage.sharing.remote_cache import RemoteCache

    if plot:
        require_plot(plot)
    if is_address(location):
        if plot:
            raise ConfigError(f"{location}: a plot needs the arrays; `gkd targets pull` it first")
        remote = RemoteCache.open(Remote(location, options))
        commits = remote.commits().values()
        result: Any = sizes(remote.id, remote.spec, remote.manifest, commits)
        total = {"address": remote.remote.address}
    else:
        result = stats(Cache.open(location))
        total = {"path": str(result.path)}
        if plot:
            plot_stats(result, plot)
    total |= msgspec.to_builtins(result, enc_hook=str)
    if as_json:
        emit_json(total)
        return
    views: Any = total.pop("views")
    emit(total, False)
    for view in views:
        view.pop("histogram", None)
        echo()
        emit(view, False)
    if not isinstance(result, CacheStats):
        echo("\nQuantiles and masses need the arrays: `gkd targets pull` the cache for them.")


@targets.command("confusions", short_help="Label-noise report from the cache alone.")
@click.argument("path", metavar="TARGETS", type=LOCAL_PATH)
@click.option(
    "--records", "source", type=LOCAL_PATH, metavar="RECORDS", help="Show faces from these records."
)
@click.option(
    "--out", type=LOCAL_PATH, required=True, metavar="FOLDER", help="Folder for the results."
)
@click.option(
    "--max-items",
    "--most",
    "max_items",
    cls=AliasedOption,
    type=click.IntRange(min=1),
    default=200,
    help="Items of each list on the page.",
)
@sort_option
@workers_option
@as_json
def targets_confusions(
    path: Path,
    source: Path | None,
    out: Path,
    max_items: int,
    sort: Any,
    workers: int,
    as_json: bool,
) -> None:
    """List the identities that the teacher of TARGETS confuses, from the cache alone.

    FOLDER receives identities.parquet (pairs of classes that share probability),
    label_noise.parquet (images that the teacher takes for another identity than their label),
    hard.parquet (images without a clear identity) and confusions.html, one page with the faces.
    """
    from gkd.storage.analysis.confusion_report import write_confusions
    from gkd.storage.cache.reader import Cache
    from gkd.storage.reading.mmap_store import DIGESTS, default_folder
    from gkd.storage.records.open import open_records

    written = write_confusions(
        Cache.open(path),
        out,
        records=open_records(source, sort=sort) if source else None,
        max_items=max_items,
        folder=default_folder() / DIGESTS,
        workers=workers,
    )
    emit(written, as_json)


@targets.command("push", cls=Resumable, short_help="Copy a cache to an address.")
@click.argument("path", metavar="TARGETS", type=LOCAL_PATH)
@click.argument("address", type=LOCATION)
@click.option("--read-back", is_flag=True, help="Read every file back and compare its sha256.")
@storage_option
@as_json
def targets_push(
    path: Path, address: str, read_back: bool, options: dict[str, Any], as_json: bool
) -> None:
    """Copy TARGETS to ADDRESS; run again to resume an interrupted push.

    ADDRESS is a folder or anything that fsspec opens: s3://, gs://, hf://, sftp://.
    """
    from gkd.storage.sharing.push import push

    emit(push(path, address, options=options, read_back=read_back), as_json)


@targets.command("pull", cls=Resumable, short_help="Copy a cache from an address.")
@click.argument("address", type=LOCATION)
@click.argument("path", metavar="TARGETS", type=LOCAL_PATH)
@click.option(
    "--shards", callback=parse_shards, help="Only these, e.g. 0-9,12; TARGETS stay partial."
)
@click.option(
    "--views", callback=parse_names, help="Only original or flipped; TARGETS hold that view."
)
@storage_option
@as_json
def targets_pull(
    address: str,
    path: Path,
    shards: tuple[int, ...] | None,
    views: Any,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Copy the cache at ADDRESS into TARGETS; run again to resume an interrupted pull.

    Every file is checked against its hash, those already in TARGETS too: pulling into a damaged
    copy repairs it.
    """
    from gkd.storage.sharing.pull import pull

    emit(pull(address, path, shards=shards, views=views, options=options), as_json)


@targets.command("retarget", cls=Resumable, short_help="Derive a smaller cache, no teacher.")
@click.argument("path", metavar="IN", type=LOCAL_PATH)
@click.argument("out", type=LOCAL_PATH)
@click.option("--threshold", type=float, help="At most that of IN.")
@click.option("--max-group", type=int, help="At most that of IN, unless IN truncated no group.")
@click.option("--temperatures", callback=parse_numbers, help="A subset of those of IN, e.g. 2,4.")
@click.option("--group-temperature", type=float, help="Must be that of IN.")
@click.option("--draws", type=int, help="Keep the first N draws of IN, or 0.")
@description_options
@as_json
def targets_retarget(path: Path, out: Path, as_json: bool, **settings: Any) -> None:
    """Derive a stricter cache OUT from IN without the teacher.

    Settings that are not given stay as in IN. What cannot be derived exactly is refused with the
    reason.
    """
    from gkd.storage.cache.reader import Cache
    from gkd.storage.cache.retarget import retarget

    id = retarget(Cache.open(path), out, **settings)
    emit({"path": out, "id": id}, as_json)


@targets.command("merge", cls=Resumable, short_help="Join caches of disjoint records.")
@click.argument("out", type=LOCAL_PATH)
@click.argument("paths", metavar="IN...", type=LOCAL_PATH, nargs=-1, required=True)
@description_options
@as_json
def targets_merge(out: Path, paths: tuple[Path, ...], as_json: bool, **description: Any) -> None:
    """Join caches IN... of disjoint records, one teacher and equal settings into OUT."""
    from gkd.storage.cache.merge import merge
    from gkd.storage.cache.reader import Cache

    id = merge([Cache.open(path) for path in paths], out, **description)
    emit({"path": out, "id": id}, as_json)


@targets.command("gc", short_help="Delete unused files in GKD_CACHE_DIR.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="DAYS",
    help="Only files unused for this many days.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be deleted; delete nothing.")
@as_json
def targets_gc(older_than: float, dry_run: bool, as_json: bool) -> None:
    """Delete files of trainings and evaluations in GKD_CACHE_DIR that no process has open.

    These are materialised targets, digests of images and embeddings of test sets; all are made
    again when needed.
    """
    from gkd.storage.reading.gc import collect

    found = collect(older_than=older_than, dry_run=dry_run)
    if as_json:
        emit_json(found)
        return
    for item in found:
        action = f"kept, {item.why}" if item.why else "would be deleted" if dry_run else "deleted"
        echo(f"{item.path}: {action}; {item.bytes:,} bytes, used {item.days:.1f} days ago")
    freed = sum(item.bytes for item in found if item.removed)
    echo(f"{freed:,} bytes {'would be ' if dry_run else ''}freed")
