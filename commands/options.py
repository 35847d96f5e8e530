"""Options and parameter types that commands share, and the parsers of their values."""

import json
import os
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import click

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import require_local
from gkd.storage.util.torchrun_env import usable_cores

F = TypeVar("F", bound=Callable[..., Any])


class AliasedOption(click.Option):
    """An option whose other spellings are accepted but not shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the help of the first spelling."""
        shown = copy(self)
        shown.opts = self.opts[:1]
        return super(AliasedOption, shown).get_help_record(ctx)


class Resumable(click.Command):
    """A command that resumes where it was interrupted, and says so."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn an interrupt into a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.ClickException(
                "interrupted; run the same command again to resume"
            ) from error


class _Location(click.Path):
    """A path or address; an empty one, which click takes for the current folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as click converts it."""
        if not os.fspath(value):
            self.fail("expected a path, got an empty one; is a shell variable unset?")
        return super().convert(value, param, ctx)


class _LocalPath(_Location):
    """A path on this machine; an address is refused by name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a Path."""
        try:
            require_local(os.fspath(value))
        except ConfigError as error:
            self.fail(str(error))
        return super().convert(value, param, ctx)


class _OutputPath(_LocalPath):
    """A path to write to, which must not lie inside a cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as a Path."""
        from gkd.storage.cache.metadata import require_outside_caches

        path = super().convert(value, param, ctx)
        require_outside_caches(path)
        return path


LOCAL_PATH: Any = _LocalPath(path_type=Path)
LOCAL_NAME: Any = _LocalPath()  # the same, kept as text
OUTPUT_PATH: Any = _OutputPath(path_type=Path)
LOCATION: Any = _Location()  # a path or an address, kept as typed


def combine(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Options that several commands take, as one decorator, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def parse_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Parse numbers such as ``1,2,4``."""
    try:
        return None if value is None else tuple(map(float, value.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 1,2,4, got {value!r}") from error


def parse_names(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Parse names separated by commas."""
    return None if value is None else tuple(value.split(","))


def parse_auto(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """Parse a whole number above 0, or ``auto``, which is None."""
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"expected auto or a whole number above 0, got {value!r}")
    return int(value)


def parse_shards(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Parse shard numbers such as ``0-9,12``."""
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


def parse_storage_options(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` settings; a value is JSON, or else plain text."""
    options = {}
    for item in values:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"expected KEY=VALUE, got {item!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
description_options = combine(
    click.option(
        "--licence",
        "--license",
        "licence",
        cls=AliasedOption,
        metavar="TEXT",
        help="Terms of use, for the card.",
    ),
    click.option("--note", metavar="TEXT", help="Anything else users should know, for the card."),
)
sort_option = click.option(
    "--sort",
    type=click.Choice(["natural", "plain"]),
    default="natural",
    help="Order of the identities of an image folder: natural puts 2 before 10, plain sorts bytes.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=usable_cores,  # called when it is needed, not on import
    show_default="cores of this rank",
    help="Threads that decode images.",
)
skip_corrupt_option = click.option(
    "--skip-corrupt", is_flag=True, help="Skip unreadable records and list them in the result."
)
storage_option = click.option(
    "--storage-option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=parse_storage_options,
    help="Setting of the address's fsspec backend, as JSON or plain text, e.g. endpoint_url=http://"
    "... for s3://. The backend's environment variables and configuration files work too and keep "
    "secrets off the command line.",
)
arch_option = click.option(
    "--arch",
    default="auto",
    metavar="NAME|package.module:factory",
    help="Network of a .pt, .pth, .ckpt or .safetensors file, e.g. iresnet50; auto recognises it "
    "by its keys. package.module:factory calls your own function: that code runs.",
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
# How a network is built, and what its input is.
network_options = combine(
    arch_option,
    click.option(
        "--preprocess",
        "preset",
        type=click.Choice(["arcface", "imagenet", "raw", "unit", "div128"]),
        default="arcface",
        help="Of pixels x: (x/255 - 0.5)/0.5, ImageNet's mean and standard deviation, x, x/255, or "
        "(x - 127.5)/128.",
    ),
    click.option(
        "--mean",
        callback=parse_numbers,
        help="In place of --preprocess: subtracted from each channel, in the network's order.",
    ),
    click.option(
        "--std", callback=parse_numbers, help="With --mean: what each channel is divided by."
    ),
    click.option(
        "--pixel-max",
        type=float,
        default=255.0,
        help="Value of a white pixel that --mean and --std refer to, 1 for 0..1.",
    ),
    click.option("--bgr", is_flag=True, help="The network takes BGR, not RGB."),
    click.option("--output", help="The embedding among the outputs of an ONNX network."),
    device_option,
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Precision of the network; auto is float32 on a CPU, half precision on a GPU.",
    ),
)
# The teacher and how it runs.
embedder_options = combine(
    click.option(
        "--teacher", type=LOCAL_PATH, required=True, help="ONNX file, weights or run folder."
    ),
    network_options,
    click.option(
        "--batch-size",
        callback=parse_auto,
        default="auto",
        help="Images per batch; auto is 128 on a CPU, 1,024 on a GPU.",
    ),
    workers_option,
)
teacher_options = combine(
    embedder_options,
    click.option(
        "--centers",
        "--centres",
        "centers",
        cls=AliasedOption,
        type=LOCAL_NAME,
        required=True,
        multiple=True,
        metavar="FILE|class-mean",
        help="Class centres [C, D]: a file, several parts or a folder of them, joined by rank; "
        "or class-mean, the mean embedding of each identity.",
    ),
    click.option(
        "--center-precision",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
        help="Precision of the class centres in memory; the effect is measured and printed.",
    ),
    click.option("--compile", is_flag=True, help="torch.compile the teacher's network."),
)
# What is stored of each prediction, other than the settings that select the groups.
target_options = combine(
    click.option(
        "--temperatures",
        callback=parse_numbers,
        default="1,2,4",
        help="Loss temperatures to store the secondary mass for.",
    ),
    click.option(
        "--max-group",
        type=int,
        default=4096,
        help="Most classes stored per group; larger groups are truncated and counted.",
    ),
    click.option(
        "--scale",
        type=float,
        default=64.0,
        help="Scale of the teacher's logits.",
    ),
    click.option(
        "--margin",
        type=float,
        default=0.4,
        help="CosFace margin on the label's cosine.",
    ),
    click.option(
        "--views",
        callback=parse_names,
        default="original,flipped",
        help="Views of each image to store; random flips in training need both.",
    ),
    click.option(
        "--shard-samples",
        callback=parse_auto,
        default="auto",
        help="Samples per shard; auto derives it from --max-group and --draws.",
    ),
    click.option(
        "--draws",
        type=click.IntRange(min=0),
        default=64,
        help="Classes to draw from each prediction at --draw-temperature; 0 for none.",
    ),
    click.option(
        "--draw-temperature",
        type=float,
        default=4.0,
        help="Temperature of the prediction that classes are drawn from.",
    ),
    click.option(
        "--draw-from",
        type=click.Choice(["all", "primary"]),
        default="all",
        help="Draw from all classes, or from the primary group before --max-group truncates it.",
    ),
)
