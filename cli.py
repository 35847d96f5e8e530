"""The command line: the only place where pipeline and trainer meet."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec

from gkd.storage.errors import GkdError

if TYPE_CHECKING:
    from gkd.pipeline.teacher import Embedder, Precision
    from gkd.storage.spec import Preprocess
    from gkd.storage.verify import Level

NO_TARGETS = Path("-")
GO_ON = "interrupted; run the same command again to go on"


class Commands(click.Group):
    """Commands whose users' mistakes end in one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors that are no bugs into click's."""
        try:
            return super().invoke(ctx)
        except GkdError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as error:
            raise click.ClickException(GO_ON) from error
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gkd")
def main() -> None:
    """Cache a face-recognition teacher once, distil any number of students from it."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Read when torch is loaded: threads that spin while they wait take the decoders' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
licence_option = click.option(
    "--licence", metavar="TEXT", help="Terms of the cache, for its README.md."
)
note_option = click.option(
    "--note", metavar="TEXT", help="Anything else its users should know, for README.md."
)
sort_option = click.option(
    "--sort",
    type=click.Choice(["natural", "plain"]),
    default="natural",
    show_default=True,
    help="Order of an image folder's identities: 2 before 10, or by bytes.",
)
preprocess_option = click.option(
    "--preprocess",
    "preset",
    type=click.Choice(["arcface", "imagenet", "raw"]),
    default="arcface",
    show_default=True,
    help="(x/255 - 0.5)/0.5, ImageNet's mean and deviation, or raw 0..255.",
)
bgr_option = click.option("--bgr", is_flag=True, help="The network takes BGR, not RGB.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda")
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
arch_option = click.option(
    "--arch",
    default="auto",
    show_default=True,
    help="Backbone of a .pt, .pth or .safetensors file, e.g. iresnet50; auto for .onnx.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    show_default="cores of this rank",
    help="Threads that decode images.",
)


def _storage_options(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    options = {}
    for each in values:
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"expected KEY=VALUE, got {each!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


storage_option = click.option(
    "--storage-option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_storage_options,
    help="Setting of the address's fsspec backend, as JSON or plain text, e.g. endpoint_url=http://"
    "... of s3://. The backend's environment variables and configuration work too, and keep "
    "secrets off the command line.",
)


def _rank() -> int:
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _path() -> Any:
    return click.Path(path_type=Path)


def _emit(value: Any, as_json: bool) -> None:
    """Print a result: one JSON object, or a line a field."""
    fields = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    if as_json:
        click.echo(json.dumps(fields))
        return
    width = max(len(name) for name in fields)
    for name, each in fields.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_words(each)}")


def _words(value: Any) -> str:
    match value:
        case bool() | str() | None:
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case dict():
            return ", ".join(f"{name} {_words(each)}" for name, each in value.items()) or "none"
        case _:
            return " ".join(_words(each) for each in value)


def _numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    try:
        return tuple(float(number) for number in value.split(",")) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 1,2,4, got {value!r}") from error


def _names(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    return None if value is None else tuple(value.split(","))


def _shards(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    shards: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            raise click.BadParameter(f"expected shards such as 0-9,12, got {value!r}")
        shards += range(int(first), int(last) + 1)
    return tuple(shards)


# --------------------------------------------------------------------------- records


@main.group()
def records() -> None:
    """Look at, check and make record packs."""


@records.command("info")
@click.argument("source", metavar="RECORDS", type=_path())
@sort_option
@as_json
def records_info(source: Path, sort: Any, as_json: bool) -> None:
    """Say what RECORDS hold: a folder with train.rec, a .rec file or an image folder."""
    from gkd.storage.records import open_records
    from gkd.storage.records_check import records_info

    _emit(records_info(open_records(source, sort=sort)), as_json)


@records.command("verify")
@click.argument("source", metavar="RECORDS", type=_path())
@sort_option
@workers_option
@as_json
def records_verify(source: Path, sort: Any, workers: int, as_json: bool) -> None:
    """Read and decode every image of RECORDS and list every fault; exit 1 if there is one."""
    from gkd.storage.records import open_records
    from gkd.storage.records_check import verify_records

    report = verify_records(open_records(source, sort=sort), workers=workers)
    faults = [str(fault) for fault in report.faults]
    if as_json:
        counts = {"images": report.images, "identities": report.identities}
        click.echo(json.dumps({**counts, "faults": faults}))
    else:
        for fault in faults:
            click.echo(fault)
        click.echo(
            f"{report.images:,} images, {report.identities:,} identities, {len(faults):,} faults"
        )
    if faults:
        raise SystemExit(1)


@records.command("pack")
@click.argument("folder", type=_path())
@click.argument("out", type=_path())
@sort_option
@workers_option
def records_pack(folder: Path, out: Path, sort: Any, workers: int) -> None:
    """Pack an image FOLDER, one folder an identity, into OUT/train.rec in InsightFace's layout."""
    from gkd.storage.packing import pack

    _emit(pack(folder, out, sort=sort, workers=workers), False)


# --------------------------------------------------------------------------- targets


@main.group()
def targets() -> None:
    """Look at and check caches of targets."""


@targets.command("info")
@click.argument("place", metavar="TARGETS")
@storage_option
@as_json
def targets_info(place: str, options: dict[str, Any], as_json: bool) -> None:
    """Say what made TARGETS, a cache here or at an address, and whether they are finished."""
    from gkd.storage.cache import Cache, committed_shards
    from gkd.storage.remote import Remote, is_address
    from gkd.storage.remote_cache import RemoteCache

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
    _emit(state | {"skipped": skipped} | msgspec.to_builtins(spec), as_json)


@targets.command("verify")
@click.argument("path", metavar="TARGETS", type=_path())
@click.option("--quick", "level", flag_value="quick", help="Presence and sizes only.")
@click.option("--deep", "level", flag_value="deep", help="Decode all arrays, check what they say.")
@click.option("--against", type=_path(), metavar="RECORDS", help="Recompute a sample of these.")
@click.option("--teacher", type=_path(), help="The teacher that recomputes.")
@click.option("--arch", help="Its backbone; by default the one that TARGETS name.")
@click.option("--centers", type=_path(), multiple=True, help="Its centres, unless class means.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--seed", type=int, help="Draws the sample; by default another one each time.")
@device_option
@sort_option
@as_json
def targets_verify(
    path: Path,
    level: "Level | None",
    against: Path | None,
    teacher: Path | None,
    arch: str | None,
    centers: tuple[Path, ...],
    sample: int,
    seed: int | None,
    device: str,
    sort: Any,
    as_json: bool,
) -> None:
    """Check every file of TARGETS and list every fault; exit 1 if there is one.

    By default every byte is held against its hash. With --against RECORDS --teacher FILE a random
    sample is computed again instead, and the largest differences are told.
    """
    from gkd.storage.verify import verify

    if (against is None) != (teacher is None) or (against and level):
        raise click.UsageError("--against RECORDS and --teacher FILE go together, and alone")
    if against and teacher:
        _verify_against(path, against, teacher, arch, centers, sample, seed, device, sort, as_json)
        return
    report = verify(path, level=level or "hashes")
    if as_json:
        plain = msgspec.to_builtins(report, enc_hook=str)
        click.echo(json.dumps({**plain, "ok": report.ok}))
    else:
        for fault in report.faults:
            click.echo(str(fault))
        click.echo(
            f"{report.shards:,} shards, {report.files:,} files, {report.bytes:,} bytes, "
            f"{report.entries:,} entries, {len(report.faults):,} faults"
        )
    if not report.ok:
        raise SystemExit(1)


def _verify_against(
    path: Path,
    source: Path,
    teacher: Path,
    arch: str | None,
    centers: tuple[Path, ...],
    sample: int,
    seed: int | None,
    device: str,
    sort: Any,
    as_json: bool,
) -> None:
    import secrets

    from gkd.pipeline.against import load_named_centers, verify_against
    from gkd.storage.cache import Cache
    from gkd.storage.records import open_records

    cache = Cache.open(path)
    named = cache.spec
    embedder = _embedder(
        teacher,
        arch=arch or named.teacher.arch,
        preprocess=named.preprocess,
        device=device,
        precision=cast("Precision", named.precision),
    )
    report = verify_against(
        cache,
        open_records(source, sort=sort),
        embedder,
        load_named_centers(cache, centers),
        sample=sample,
        seed=secrets.randbits(32) if seed is None else seed,
        workers=os.cpu_count() or 1,
    )
    _emit({**msgspec.to_builtins(report), "ok": report.ok}, as_json)
    if not report.ok:
        raise SystemExit(1)


@targets.command("stats")
@click.argument("place", metavar="TARGETS")
@click.option("--plot", type=_path(), help="Draw group sizes and masses into this PNG.")
@storage_option
@as_json
def targets_stats(place: str, plot: Path | None, options: dict[str, Any], as_json: bool) -> None:
    """Describe group sizes, masses and bytes of TARGETS, a cache here or at an address.

    At an address the arrays are left there: sizes and counts only.
    """
    from gkd.storage.cache import Cache
    from gkd.storage.errors import ConfigError
    from gkd.storage.remote import Remote, is_address
    from gkd.storage.remote_cache import RemoteCache, remote_stats
    from gkd.storage.stats import CacheStats, plot_stats, stats

    if is_address(place):
        if plot:
            raise ConfigError(f"{place}: a plot needs the arrays; `gkd targets pull` it first")
        figures: Any = remote_stats(RemoteCache.open(Remote(place, options)))
    else:
        figures = stats(Cache.open(place))
        if plot:
            plot_stats(figures, plot)
    if as_json:
        click.echo(msgspec.json.encode(figures, enc_hook=str).decode())
        return
    whole = msgspec.to_builtins(figures, enc_hook=str)
    views = whole.pop("views")
    _emit(whole, False)
    for view in views:
        view.pop("histogram", None)
        click.echo()
        _emit(view, False)
    if not isinstance(figures, CacheStats):
        click.echo("\nQuantiles and masses need the arrays: `gkd targets pull` the cache for them.")


@targets.command("push")
@click.argument("path", metavar="TARGETS", type=_path())
@click.argument("address")
@click.option("--read-back", is_flag=True, help="Read every file back and compare its sha256.")
@storage_option
@as_json
def targets_push(
    path: Path, address: str, read_back: bool, options: dict[str, Any], as_json: bool
) -> None:
    """Send TARGETS to ADDRESS, or go on where an earlier push stopped.

    ADDRESS is a folder or anything that fsspec opens: s3://, gs://, hf://, sftp://.
    """
    from gkd.storage.transfer import push

    _emit(push(path, address, options=options, read_back=read_back), as_json)


@targets.command("pull")
@click.argument("address")
@click.argument("path", metavar="TARGETS", type=_path())
@click.option("--shards", callback=_shards, help="These only, e.g. 0-9,12: TARGETS stay partial.")
@click.option("--views", callback=_names, help="original or flipped: TARGETS are a cache of it.")
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
    from gkd.storage.transfer import pull

    _emit(pull(address, path, shards=shards, views=views, options=options), as_json)


@targets.command("retarget")
@click.argument("path", metavar="IN", type=_path())
@click.argument("out", type=_path())
@click.option("--threshold", type=float, help="At most that of IN.")
@click.option("--max-group", type=int, help="At most that of IN, or more where no group was cut.")
@click.option("--temperatures", callback=_numbers, help="Some of those of IN, such as 2,4.")
@click.option("--group-temperature", type=float, help="That of IN; no other can be answered.")
@licence_option
@note_option
def targets_retarget(path: Path, out: Path, **settings: Any) -> None:
    """Derive a stricter cache OUT from IN without the teacher, or go on with it.

    What is not given stays as in IN. What IN cannot answer exactly is refused with the reason.
    """
    from gkd.storage.cache import Cache
    from gkd.storage.retarget import retarget

    click.echo(f"{out}: {retarget(Cache.open(path), out, **settings)}")


@targets.command("merge")
@click.argument("out", type=_path())
@click.argument("paths", metavar="IN...", type=_path(), nargs=-1, required=True)
@licence_option
@note_option
def targets_merge(
    out: Path, paths: tuple[Path, ...], licence: str | None, note: str | None
) -> None:
    """Join caches IN... of disjoint records, one teacher and equal settings into OUT."""
    from gkd.storage.cache import Cache
    from gkd.storage.merge import merge

    id = merge([Cache.open(path) for path in paths], out, licence=licence, note=note)
    click.echo(f"{out}: {id}")


@targets.command("gc")
@click.option("--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@as_json
def targets_gc(older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove what trainings left in GKD_CACHE_DIR and no process has open.

    These are targets made ready for reading and digests of images; both are made again as needed.
    """
    from gkd.storage.materialise import collect

    found = collect(older_than=older_than, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found, enc_hook=str)))
        return
    for each in found:
        did = f"stays, {each.why}" if each.why else "would go" if dry_run else "removed"
        click.echo(f"{each.path}: {did}; {each.bytes:,} bytes, used {each.days:.1f} days ago")
    freed = sum(each.bytes for each in found if each.removed)
    click.echo(f"{freed:,} bytes {'would be ' if dry_run else ''}freed")


# --------------------------------------------------------------------------- the two stages


def _embedder(
    path: Path, *, arch: str, preprocess: "Preprocess", device: str, precision: "Precision"
) -> "Embedder":
    """Any model that a command takes: an ONNX file, weights, or a run of ``train-student``."""
    from gkd.pipeline.teacher import OnnxEmbedder, TorchEmbedder
    from gkd.storage.atomic import sha256_file
    from gkd.trainer.backbones import load_backbone
    from gkd.trainer.checkpoint import chosen_checkpoint

    if path.suffix == ".onnx":
        return OnnxEmbedder(path, preprocess, device=device)
    weights = chosen_checkpoint(path) if path.is_dir() else path
    return TorchEmbedder(
        load_backbone(arch, weights),
        name=path.name if path.is_dir() else path.stem,
        arch=arch,
        sha256=sha256_file(weights),
        preprocess=preprocess,
        device=device,
        precision=precision,
    )


@main.command("cache-teacher")
@click.argument("source", metavar="RECORDS", type=_path())
@click.argument("out", type=_path())
@click.option("--teacher", type=_path(), required=True, help="ONNX file, weights or run folder.")
@arch_option
@click.option(
    "--centers",
    required=True,
    multiple=True,
    metavar="FILE|class-mean",
    help="Class centres [C, D]; several files are joined; or the mean of each class.",
)
@click.option("--threshold", type=float, default=0.93, show_default=True)
@click.option("--group-temperature", type=float, default=2.0, show_default=True)
@click.option("--temperatures", callback=_numbers, default="1,2,4", show_default=True)
@click.option("--max-group", type=int, default=4096, show_default=True)
@click.option("--scale", type=float, default=64.0, show_default=True)
@click.option("--margin", type=float, default=0.4, show_default=True)
@click.option("--views", callback=_names, default="original,flipped", show_default=True)
@preprocess_option
@bgr_option
@click.option("--batch-size", type=int, default=128, show_default=True)
@device_option
@precision_option
@workers_option
@click.option("--shard-samples", type=int, help="Samples a shard; by default from --max-group.")
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
    views: Any,
    preset: str,
    bgr: bool,
    batch_size: int,
    device: str,
    precision: "Precision",
    workers: int,
    shard_samples: int | None,
    skip_corrupt: bool,
    licence: str | None,
    note: str | None,
    sort: Any,
    as_json: bool,
) -> None:
    """Run the teacher over RECORDS once and store its primary groups in OUT, or go on with it."""
    from gkd.pipeline.centers import Centers, load_centers
    from gkd.pipeline.partition import PartitionSettings
    from gkd.pipeline.run import CLASS_MEAN, CacheSettings
    from gkd.pipeline.run import cache_teacher as run
    from gkd.storage.records import open_records
    from gkd.storage.spec import preprocess_preset

    settings = CacheSettings(
        partition=PartitionSettings(
            threshold=threshold,
            group_temperature=group_temperature,
            temperatures=temperatures,
            max_group=max_group,
            scale=scale,
            margin=margin,
        ),
        views=views,
        batch_size=batch_size,
        workers=workers,
        skip_corrupt=skip_corrupt,
        shard_samples=shard_samples,
        licence=licence,
        note=note,
    )
    records = open_records(source, sort=sort)
    preprocess = preprocess_preset(preset, bgr=bgr)
    embedder = _embedder(
        teacher, arch=arch, preprocess=preprocess, device=device, precision=precision
    )
    if centers == (CLASS_MEAN,):
        summary = run(records, out, embedder, CLASS_MEAN, settings)
    else:
        files = [Path(file) for file in centers]
        array = load_centers(files, records.num_classes, embedder.embedding_dim)
        names = " ".join(file.name for file in files)
        summary = run(records, out, embedder, Centers(array, "file", names), settings)
    if _rank() == 0:
        speed = {"images_per_second": summary.images_per_second}
        _emit({**msgspec.to_builtins(summary), **speed}, as_json)


@main.command("train-student")
@click.argument("source", metavar="RECORDS", type=_path())
@click.argument("path", metavar="TARGETS", type=_path())
@click.argument("out", type=_path())
@click.option("--config", type=_path(), help="Settings of the run, a TOML file with sections.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="One setting.")
@click.option("--student", help="Backbone, the same as --set student.name=...")
@click.option("--without-kd", is_flag=True, help="The same run with cross-entropy alone.")
@click.option("--drop-unmatched", is_flag=True, help="Leave out images that TARGETS do not know.")
@sort_option
def train_student(
    source: Path,
    path: Path,
    out: Path,
    config: Path | None,
    settings: tuple[str, ...],
    student: str | None,
    without_kd: bool,
    drop_unmatched: bool,
    sort: Any,
) -> None:
    """Train a student on RECORDS from TARGETS into the run folder OUT, or go on with it.

    Where there are no TARGETS, write - for them, with --without-kd.
    """
    from gkd.storage.cache import Cache
    from gkd.storage.records import open_records
    from gkd.trainer.config import load_config
    from gkd.trainer.data import join_targets
    from gkd.trainer.loop import train

    chosen = [f"student.name={student}"] if student else []
    chosen += ["kd.enabled=false"] if without_kd else []
    run = load_config(config, [*settings, *chosen])
    records = open_records(source, sort=sort)
    joined = None
    if path != NO_TARGETS:
        # Without distillation as well: both runs leave out what the cache left out.
        records, joined = join_targets(
            records,
            Cache.open(path),
            workers=os.cpu_count() or 1,
            drop_unmatched=drop_unmatched,
            # Blocks need nothing made ready, and so they do where no target is read.
            order=run.data.order if run.kd.enabled else "blocks",
        )
        if joined.unmatched:
            told = (
                f"{joined.unmatched:,} images without targets are left out, {len(records):,} stay"
            )
            click.echo(told, err=True)
    _emit(train(run, records, joined, out, command=["gkd", *sys.argv[1:]]), False)


@main.command("evaluate")
@click.argument("model", type=_path())
@click.argument("sets", metavar="BIN...", type=_path(), nargs=-1, required=True)
@arch_option
@preprocess_option
@bgr_option
@device_option
@precision_option
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--plot", type=_path(), help="Draw the ROC into this PNG.")
@as_json
def evaluate(
    model: Path,
    sets: tuple[Path, ...],
    arch: str,
    preset: str,
    bgr: bool,
    device: str,
    precision: "Precision",
    batch_size: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Verify MODEL on verification sets: a run folder, a checkpoint, weights or an ONNX file."""
    from rich.console import Console

    from gkd.storage.spec import preprocess_preset
    from gkd.trainer.evaluation import evaluate, plot_roc, results_table
    from gkd.trainer.verification_set import load_verification_set

    preprocess = preprocess_preset(preset, bgr=bgr)
    embed = _embedder(model, arch=arch, preprocess=preprocess, device=device, precision=precision)
    pairs = [load_verification_set(path) for path in sets]
    results = [evaluate(embed, each, batch_size=batch_size) for each in pairs]
    for result in results:
        if result.one_sided_folds:
            click.echo(
                f"{result.name}: {result.one_sided_folds} of 10 folds hold genuine or impostor "
                "pairs only, which biases the accuracy; compare by AUC and EER",
                err=True,
            )
    if plot:
        plot_roc(results, plot)
    if as_json:
        click.echo(json.dumps([result.to_builtins() for result in results]))
    else:
        Console().print(results_table(results))


@main.command("export")
@click.argument("run", type=_path())
@click.argument("out", metavar="OUT.onnx", type=_path())
def export(run: Path, out: Path) -> None:
    """Write the student of RUN, a run folder or a checkpoint, as ONNX with any batch size."""
    from gkd.storage.spec import preprocess_preset
    from gkd.trainer.checkpoint import load_student
    from gkd.trainer.export import export_onnx

    student = load_student(run)
    name = student.config.student.name
    export_onnx(student.backbone, out, preprocess=preprocess_preset("arcface"), name=name)
    click.echo(f"{out}: {out.stat().st_size:,} bytes, checked against torch")


@main.command("demo")
@click.argument("out", type=_path(), default=Path("gkd-demo"))
def demo(out: Path) -> None:
    """Draw faces, train a teacher on them, cache it, and train a student with and without it."""
    from gkd.demo import run_demo

    run_demo(out)


if __name__ == "__main__":
    main()
