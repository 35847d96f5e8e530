"""``gkd targets``: look at, check, share and derive caches."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gkd.commands.shared import (
    OUT,
    PATH,
    PLACE,
    Resumable,
    as_json,
    build_embedder,
    device_option,
    emit,
    emit_json,
    licence_option,
    note_option,
    parse_names,
    parse_numbers,
    parse_shards,
    printable,
    require_plot,
    sort_option,
    storage_option,
    workers_option,
)
from gkd.storage.util.torchrun_env import usable_cores

if TYPE_CHECKING:
    from gkd.pipeline.checks.recompute import AgainstReport
    from gkd.storage.cache.verify import Level


@click.group()
def targets() -> None:
    """Look at caches of targets, check, share and derive them."""


@targets.command("info")
@click.argument("place", metavar="TARGETS", type=PLACE)
@storage_option
@as_json
def targets_info(place: str, options: dict[str, Any], as_json: bool) -> None:
    """Say what made TARGETS, a cache here or at an address, and whether they are finished."""
    from gkd.storage.cache.metadata import committed_shards
    from gkd.storage.cache.reader import Cache
    from gkd.storage.sharing.remote import Remote, is_address
    from gkd.storage.sharing.remote_cache import RemoteCache

    if is_address(place):
        remote = RemoteCache.open(Remote(place, options))
        commits = remote.commits()
        state = {"address": remote.remote.address, "id": remote.id, "shards": len(commits)}
        state["bytes"] = remote.manifest.bytes
        spec = remote.spec
    else:
        cache = Cache.open(place, complete=False)
        commits = {shard: cache.commit(shard) for shard in committed_shards(cache.path)}
        state = {"path": cache.path, "id": cache.id if cache.manifest else "not finished"}
        state |= {"shards": cache.spec.num_shards, "committed_shards": len(commits)}
        spec = cache.spec
    skipped = {key: why for commit in commits.values() for key, why in commit.skipped.items()}
    emit(state | {"skipped": skipped} | msgspec.to_builtins(spec), as_json)


@targets.command("verify")
@click.argument("path", metavar="TARGETS", type=PATH)
@click.option("--quick", is_flag=True, help="Presence and sizes only.")
@click.option("--deep", is_flag=True, help="Decode all arrays, check what they say.")
@click.option("--against", type=PATH, metavar="RECORDS", help="Recompute a sample of these.")
@click.option("--teacher", type=PATH, help="The teacher that recomputes.")
@click.option("--arch", help="Its backbone; by default the one that TARGETS name.")
@click.option("--centers", type=PATH, multiple=True, help="Its centres, unless class means.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--seed", type=int, help="Draws the sample; by default another one each time.")
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
    **recomputing: Any,
) -> None:
    """Check every file of TARGETS and list every fault; exit 1 if there is one.

    By default every byte is held against its hash. With --against RECORDS --teacher FILE a random
    sample is computed again instead, and the largest differences are told.
    """
    from gkd.storage.cache.verify import verify

    if quick and deep:
        raise click.UsageError("--quick and --deep exclude each other; give one of them")
    if (against is None) != (teacher is None) or (against and (quick or deep)):
        raise click.UsageError("--against RECORDS and --teacher FILE go together, and alone")
    ok: bool
    if against and teacher:
        compared = _verify_against(path, against, teacher, **recomputing)
        ok = compared.ok
        emit({**msgspec.to_builtins(compared), "ok": ok}, as_json)
    else:
        level: Level = "quick" if quick else "deep" if deep else "hashes"
        report = verify(path, level=level)
        ok = report.ok
        if as_json:
            emit_json({**msgspec.to_builtins(report, enc_hook=str), "ok": ok})
        else:
            for fault in report.faults:
                click.echo(printable(str(fault)))
            click.echo(
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
    from gkd.pipeline.checks.recompute import load_named_centers, verify_against
    from gkd.storage.cache.reader import Cache
    from gkd.storage.errors import ConfigError
    from gkd.storage.records.open import open_records

    cache = Cache.open(path)
    named = cache.spec
    if ":" in named.teacher.arch and arch is None:
        raise ConfigError(
            f"{path}: names the code {named.teacher.arch} as its teacher's network, and no code is "
            "run because a cache names it; where you know and trust it, give --arch "
            f"{named.teacher.arch} yourself"
        )
    arch = arch or named.teacher.arch
    # An ONNX file where weights were, or the reverse, is another teacher: its digest tells.
    torch_network = arch != "onnx" and teacher.suffix != ".onnx"
    embedder = build_embedder(
        teacher,
        arch=arch if torch_network else "auto",
        preprocess=named.preprocess,
        device=device,
        precision=named.precision if torch_network else "auto",
    )
    return verify_against(
        cache,
        open_records(source, sort=sort),
        embedder,
        load_named_centers(cache, centers),
        sample=sample,
        seed=secrets.randbits(32) if seed is None else seed,
        workers=usable_cores(),
    )


@targets.command("stats")
@click.argument("place", metavar="TARGETS", type=PLACE)
@click.option("--plot", type=OUT, help="Draw group sizes and masses into this PNG.")
@storage_option
@as_json
def targets_stats(place: str, plot: Path | None, options: dict[str, Any], as_json: bool) -> None:
    """Describe group sizes, masses and bytes of TARGETS, a cache here or at an address.

    At an address the arrays are left there: sizes and counts only.
    """
    from gkd.storage.analysis.stats import CacheStats, plot_stats, stats
    from gkd.storage.cache.reader import Cache
    from gkd.storage.errors import ConfigError
    from gkd.storage.sharing.remote import Remote, is_address
    from gkd.storage.sharing.remote_cache import RemoteCache, remote_stats

    if plot:
        require_plot(plot)
    if is_address(place):
        if plot:
            raise ConfigError(f"{place}: a plot needs the arrays; `gkd targets pull` it first")
        figures: Any = remote_stats(RemoteCache.open(Remote(place, options)))
    else:
        figures = stats(Cache.open(place))
        if plot:
            plot_stats(figures, plot)
    if as_json:
        emit_json(figures)
        return
    whole = msgspec.to_builtins(figures, enc_hook=str)
    views = whole.pop("views")
    emit(whole, False)
    for view in views:
        view.pop("histogram", None)
        click.echo()
        emit(view, False)
    if not isinstance(figures, CacheStats):
        click.echo("\nQuantiles and masses need the arrays: `gkd targets pull` the cache for them.")


@targets.command("confusions")
@click.argument("path", metavar="TARGETS", type=PATH)
@click.option("--records", "source", type=PATH, metavar="RECORDS", help="Show faces from these.")
@click.option("--out", type=PATH, required=True, metavar="FOLDER", help="Where the results go.")
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Items of each list on the page.",
)
@sort_option
@workers_option
@as_json
def targets_confusions(
    path: Path,
    source: Path | None,
    out: Path,
    most: int,
    sort: Any,
    workers: int,
    as_json: bool,
) -> None:
    """List what the teacher of TARGETS confuses, from the cache alone.

    FOLDER gets identities.parquet (pairs that share mass), label_noise.parquet (images that it
    takes for another identity than their label), hard.parquet (images that no identity claims) and
    confusions.html, one page with the faces.
    """
    from gkd.storage.analysis.confusion_files import write_confusions
    from gkd.storage.cache.reader import Cache
    from gkd.storage.reading.mmap_store import DIGESTS, default_folder
    from gkd.storage.records.open import open_records

    cache = Cache.open(path)
    records = open_records(source, sort=sort) if source else None
    folder = default_folder() / DIGESTS
    written = write_confusions(
        cache, out, records=records, most=most, folder=folder, workers=workers
    )
    emit(written, as_json)


@targets.command("push", cls=Resumable)
@click.argument("path", metavar="TARGETS", type=PATH)
@click.argument("address", type=PLACE)
@click.option("--read-back", is_flag=True, help="Read every file back and compare its sha256.")
@storage_option
@as_json
def targets_push(
    path: Path, address: str, read_back: bool, options: dict[str, Any], as_json: bool
) -> None:
    """Send TARGETS to ADDRESS, or go on where an earlier push stopped.

    ADDRESS is a folder or anything that fsspec opens: s3://, gs://, hf://, sftp://.
    """
    from gkd.storage.sharing.push import push

    emit(push(path, address, options=options, read_back=read_back), as_json)


@targets.command("pull", cls=Resumable)
@click.argument("address", type=PLACE)
@click.argument("path", metavar="TARGETS", type=PATH)
@click.option(
    "--shards", callback=parse_shards, help="These only, e.g. 0-9,12: TARGETS stay partial."
)
@click.option(
    "--views", callback=parse_names, help="original or flipped: TARGETS are a cache of it."
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
    """Get the cache at ADDRESS into TARGETS, or go on where an earlier pull stopped.

    Every file is held against its hash on arrival, and those that stand in TARGETS already too: a
    pull into a damaged copy mends it.
    """
    from gkd.storage.sharing.pull import pull

    emit(pull(address, path, shards=shards, views=views, options=options), as_json)


@targets.command("retarget", cls=Resumable)
@click.argument("path", metavar="IN", type=PATH)
@click.argument("out", type=PATH)
@click.option("--threshold", type=float, help="At most that of IN.")
@click.option("--max-group", type=int, help="At most that of IN, or more where no group was cut.")
@click.option("--temperatures", callback=parse_numbers, help="Some of those of IN, such as 2,4.")
@click.option("--group-temperature", type=float, help="That of IN; no other can be answered.")
@click.option("--draws", type=int, help="The first so many of IN's draws, or 0.")
@licence_option
@note_option
@as_json
def targets_retarget(path: Path, out: Path, as_json: bool, **settings: Any) -> None:
    """Derive a stricter cache OUT from IN without the teacher, or go on with it.

    What is not given stays as in IN. What IN cannot answer exactly is refused with the reason.
    """
    from gkd.storage.cache.reader import Cache
    from gkd.storage.cache.retarget import retarget

    id = retarget(Cache.open(path), out, **settings)
    emit({"path": out, "id": id}, as_json)


@targets.command("merge", cls=Resumable)
@click.argument("out", type=PATH)
@click.argument("paths", metavar="IN...", type=PATH, nargs=-1, required=True)
@licence_option
@note_option
@as_json
def targets_merge(out: Path, paths: tuple[Path, ...], as_json: bool, **words: Any) -> None:
    """Join caches IN... of disjoint records, one teacher and equal settings into OUT."""
    from gkd.storage.cache.merge import merge
    from gkd.storage.cache.reader import Cache

    id = merge([Cache.open(path) for path in paths], out, **words)
    emit({"path": out, "id": id}, as_json)


@targets.command("gc")
@click.option("--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@as_json
def targets_gc(older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove what trainings and evaluations left in GKD_CACHE_DIR and no process has open.

    These are targets made ready for reading, digests of images and embeddings of test sets; all
    are made again as needed.
    """
    from gkd.storage.reading.mmap_store import collect

    found = collect(older_than=older_than, dry_run=dry_run)
    if as_json:
        emit_json(found)
        return
    for each in found:
        did = f"stays, {each.why}" if each.why else "would go" if dry_run else "removed"
        click.echo(f"{each.path}: {did}; {each.bytes:,} bytes, used {each.days:.1f} days ago")
    freed = sum(each.bytes for each in found if each.removed)
    click.echo(f"{freed:,} bytes {'would be ' if dry_run else ''}freed")
