"""What commands share: options, how values are read from words, and how results are printed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
import msgspec
from click.core import ParameterSource

from gkd.storage.util.torchrun_env import usable_cores

if TYPE_CHECKING:
    from gkd.pipeline.centers.load import Centers
    from gkd.pipeline.settings import CacheSettings
    from gkd.pipeline.teacher.embedder import Embedder
    from gkd.storage.cache.spec import Precision, Preprocess
    from gkd.storage.records.open import Records

F = TypeVar("F", bound=Callable[..., Any])


class Resumable(click.Command):
    """A command that goes on where it was interrupted, and says so."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; turn an interrupt into a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.ClickException(
                "interrupted; run the same command again to go on"
            ) from error


class _Place(click.Path):
    """A path or address that is not empty, which would be taken for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, as click converts it."""
        if not os.fspath(value):
            self.fail("expected a path, got an empty one; see whether a variable is not set")
        return super().convert(value, param, ctx)


class _Outside(_Place):
    """A path that is written to, which must not lie in a cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, as click converts it."""
        from gkd.storage.cache.places import require_outside_caches

        path = super().convert(value, param, ctx)
        require_outside_caches(path)
        return path


PATH: Any = _Place(path_type=Path)
OUT: Any = _Outside(path_type=Path)
# A path or an address, as it was typed.
PLACE: Any = _Place()

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
    metavar="NAME|package.module:factory",
    help="Backbone of a .pt, .pth, .ckpt or .safetensors file, e.g. iresnet50; auto tells it from "
    "the keys. With package.module:factory your own code makes the network: it is run as it is.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=usable_cores(),
    show_default="cores of this rank",
    help="Threads that decode images.",
)


def parse_storage_options(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """``KEY=VALUE`` settings; a value is JSON, or else plain text."""
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
    callback=parse_storage_options,
    help="Setting of the address's fsspec backend, as JSON or plain text, e.g. endpoint_url=http://"
    "... of s3://. The backend's environment variables and configuration work too, and keep "
    "secrets off the command line.",
)


def emit(value: Any, as_json: bool) -> None:
    """Print a result: one JSON object, or a line a field."""
    if as_json:
        emit_json(value)
        return
    fields = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    width = max(len(name) for name in fields)
    for name, each in fields.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_words(each)}")


def emit_json(value: Any) -> None:
    """Print anything as one line of JSON; what is not finite is null there."""
    click.echo(msgspec.json.encode(value, enc_hook=str))


def printable(text: str) -> str:
    """The text, but for what steers a terminal: a cache's or a record's names are a stranger's."""
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def _words(value: Any) -> str:
    match value:
        case bool() | None:
            return str(value)
        case str():
            return printable(value).replace("\n", "\N{REPLACEMENT CHARACTER}")
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case dict():
            parts = (f"{_words(name)} {_words(each)}" for name, each in value.items())
            return ", ".join(parts) or "none"
        case _:
            return " ".join(_words(each) for each in value)


def parse_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Numbers such as ``1,2,4``."""
    try:
        return tuple(float(number) for number in value.split(",")) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 1,2,4, got {value!r}") from error


def parse_auto(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """A whole number above 0, or ``auto``."""
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"expected auto or a whole number above 0, got {value!r}")
    return int(value)


def parse_names(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Names with commas between them."""
    return None if value is None else tuple(value.split(","))


def parse_shards(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Shards such as ``0-9,12``."""
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


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Options that several commands take, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


batch_size_option = click.option(
    "--batch-size",
    callback=parse_auto,
    default="auto",
    show_default=True,
    help="Images a batch; auto is 128 on a CPU, 1,024 on a GPU.",
)
# What a teacher is, and how it is run.
teacher_options = together(
    click.option("--teacher", type=PATH, required=True, help="ONNX file, weights or run folder."),
    arch_option,
    click.option(
        "--centers",
        required=True,
        multiple=True,
        metavar="FILE|class-mean",
        help="Class centres [C, D], a folder of parts, or several files, which are joined, parts "
        "by their rank; or the mean of each class.",
    ),
    preprocess_option,
    bgr_option,
    batch_size_option,
    device_option,
    precision_option,
    click.option(
        "--center-precision",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Of the centres in memory; the run tells what half of it changes.",
    ),
    click.option("--compile", is_flag=True, help="torch.compile the teacher's network."),
    workers_option,
)
# What is kept of its predictions, but for the settings that choose the groups.
target_options = together(
    click.option("--temperatures", callback=parse_numbers, default="1,2,4", show_default=True),
    click.option("--max-group", type=int, default=4096, show_default=True),
    click.option("--scale", type=float, default=64.0, show_default=True),
    click.option("--margin", type=float, default=0.4, show_default=True),
    click.option("--views", callback=parse_names, default="original,flipped", show_default=True),
    click.option(
        "--shard-samples",
        callback=parse_auto,
        default="auto",
        show_default=True,
        help="Samples a shard; auto goes by --max-group and --draws.",
    ),
    click.option(
        "--draws",
        type=click.IntRange(min=0),
        default=64,
        show_default=True,
        help="Classes to draw from the prediction at --draw-temperature; 0 for none.",
    ),
    click.option("--draw-temperature", type=float, default=4.0, show_default=True),
    click.option(
        "--draw-from",
        type=click.Choice(["all", "primary"]),
        default="all",
        show_default=True,
        help="All classes, or the primary group before --max-group cuts it.",
    ),
)


def chosen_teacher(options: Mapping[str, Any]) -> "Embedder":
    """The teacher of ``teacher_options``."""
    from gkd.storage.cache.spec import preprocess_preset

    return build_embedder(
        options["teacher"],
        preprocess=preprocess_preset(options["preset"], bgr=options["bgr"]),
        **{name: options[name] for name in ("arch", "device", "precision", "compile")},
    )


def cache_settings(options: Mapping[str, Any]) -> "CacheSettings":
    """The settings that options of the same names say; others stay at their defaults.

    Raises:
        ConfigError: for a value outside its range.
    """
    from dataclasses import fields

    from gkd.pipeline.settings import CacheSettings, PartitionSettings
    from gkd.storage.cache.spec import DrawsSpec

    def named(kind: Any) -> dict[str, Any]:
        return {each.name: options[each.name] for each in fields(kind) if each.name in options}

    draws = None
    if not options["draws"]:
        context = click.get_current_context()
        for name in ("draw_temperature", "draw_from", "seed"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} says how classes are drawn; give --draws too, "
                    "above 0"
                )
    else:
        draws = DrawsSpec(
            options["draws"],
            options["draw_temperature"],
            options["draw_from"],
            options.get("seed", 0),  # what a plan forecasts is the same for all
        )
    partition = PartitionSettings(**{**named(PartitionSettings), "draws": draws})
    return CacheSettings(**{**named(CacheSettings), "partition": partition})


def require_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before the work that it is to show.

    Raises:
        ConfigError: naming the folder that is not there, or the extra that draws.
    """
    from gkd.storage.errors import ConfigError
    from gkd.storage.util.extras import require

    if path.is_dir():
        raise ConfigError(f"--plot {path}: expected a PNG file to write, got a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--plot {path}: there is no folder {path.parent}; make it, or write elsewhere"
        )
    require("matplotlib.figure", "plot")


def build_embedder(
    path: Path,
    *,
    arch: str,
    preprocess: "Preprocess",
    device: str,
    precision: 'Precision | Literal["auto"]',
    compile: bool = False,
) -> "Embedder":
    """Any model that a command takes: an ONNX file, weights, or a run of ``train-student``.

    Raises:
        GkdError: where it cannot be read, or an option does not go with it.
    """
    from gkd.pipeline.teacher.embedder import OnnxEmbedder, TorchEmbedder
    from gkd.storage.errors import ConfigError
    from gkd.storage.util.files import sha256_file
    from gkd.trainer.backbones import load_backbone
    from gkd.trainer.checkpoint import chosen_checkpoint

    if path.suffix == ".onnx":
        refused = {
            "--compile": compile,
            f"--precision {precision}": precision not in ("auto", "float32"),
            f"--arch {arch}": arch not in ("auto", "onnx"),
        }
        for option in (each for each, holds in refused.items() if holds):
            raise ConfigError(
                f"{path}: {option}: expected weights for a network of torch, got an ONNX file, "
                "which is the network already and which onnxruntime runs as it is; leave "
                f"{option.split()[0]} out"
            )
        return OnnxEmbedder(path, preprocess, device=device)
    weights = chosen_checkpoint(path) if path.is_dir() else path
    backbone = load_backbone(arch, weights)
    return TorchEmbedder(
        backbone.module,
        name=path.name if path.is_dir() else path.stem,
        arch=backbone.name,
        sha256=sha256_file(weights),
        preprocess=preprocess,
        device=device,
        precision=precision,
        compile=compile,
    )


def chosen_centers(
    given: tuple[str, ...], records: "Records", embedder: "Embedder"
) -> 'Centers | Literal["class-mean"]':
    """The class centres that ``--centers`` names, from files, or the word for class means.

    Raises:
        GkdError: where both are named, or the files do not fit records and teacher.
    """
    from gkd.pipeline.centers.load import CLASS_MEAN, open_centers
    from gkd.storage.errors import ConfigError

    if CLASS_MEAN in given and len(given) > 1:
        raise ConfigError(
            f"--centers: expected either {CLASS_MEAN} alone or files, got {' '.join(given)}; "
            "give one or the other"
        )
    if CLASS_MEAN in given:
        return CLASS_MEAN
    return open_centers([Path(file) for file in given], records, embedder)
