"""Objects that commands make from their options: embedders, class centres, settings."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from gkd.pipeline.centers.load import Centers
    from gkd.pipeline.settings import CacheSettings
    from gkd.pipeline.teacher.embedder import Embedder
    from gkd.storage.cache.reader import Cache
    from gkd.storage.cache.spec import Preprocess
    from gkd.storage.records.base import Records
    from gkd.storage.util.torch_device import Precision


def open_faces(source: Path, sort: Any) -> "Records":
    """Open records for long work: what is left out of them is said, a fault of them all is raised.

    Raises:
        GkdError: as ``open_records``, and if every image that is looked at has the same fault.
    """
    from gkd.storage.records.check import log_left_out, require_faces
    from gkd.storage.records.open import open_records

    records = open_records(source, sort=sort)
    log_left_out(records)
    require_faces(records)
    return records


def note_older_pixels(cache: "Cache") -> None:
    """Say that images may be turned now that were not when an older cache was made."""
    from msgspec import UNSET

    from gkd.storage.util.torchrun_env import log_rank0

    if cache.spec.pixels is UNSET:
        log_rank0(
            f"{cache.path}: made by an older version, which ignored the EXIF orientation of images "
            "and now turns them: targets of turned images are of other pixels (`gkd records "
            "verify` counts these; if there are any, make the cache again)"
        )


def embedder_from_options(path: Path, options: Mapping[str, Any]) -> "Embedder":
    """Load the network at ``path`` as ``network_options`` say."""
    return build_embedder(
        path,
        arch=options["arch"],
        preprocess=preprocess_from_options(options),
        device=options["device"],
        precision=options["precision"],
        output=options["output"],
        compile=options.get("compile", False),
    )


def preprocess_from_options(options: Mapping[str, Any]) -> "Preprocess":
    """How pixels become the network's input: a preset, or --mean and --std."""
    from gkd.storage.cache.spec import custom_preprocess, preprocess_preset

    mean, std = options["mean"], options["std"]
    source = click.get_current_context().get_parameter_source
    if not mean and not std:
        if source("pixel_max") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--pixel-max goes with --mean and --std")
        return preprocess_preset(options["preset"], bgr=options["bgr"])
    if not mean or not std:
        raise click.UsageError("--mean and --std go together")
    if source("preset") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--mean and --std exclude --preprocess")
    return custom_preprocess(mean, std, pixel_max=options["pixel_max"], bgr=options["bgr"])


def build_embedder(
    path: Path,
    *,
    arch: str,
    preprocess: "Preprocess",
    device: str,
    precision: 'Precision | Literal["auto"]',
    output: str | None = None,
    compile: bool = False,
) -> "Embedder":
    """Load any model that a command takes: an ONNX file, weights, or a run of ``train-student``.

    Raises:
        GkdError: if the file cannot be read, or an option does not apply to it.
    """
    from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
    from gkd.pipeline.teacher.torch_embedder import TorchEmbedder
    from gkd.storage.errors import ConfigError
    from gkd.storage.util.files import sha256_file
    from gkd.trainer.backbones import load_backbone
    from gkd.trainer.checkpoint import chosen_checkpoint

    if path.suffix == ".onnx":
        refused = {
            "--compile": compile,
            f"--precision {precision}": precision not in ("auto", "float32"),
            f"--arch {arch}": arch not in ("auto", "onnx") and not arch.startswith("onnx:"),
        }
        for option in (name for name, given in refused.items() if given):
            raise ConfigError(
                f"{path}: {option}: expected weights for a torch network, got an ONNX file, which "
                f"contains its network and runs in onnxruntime; omit {option.split()[0]}"
            )
        output = output or arch.partition(":")[2] or None
        return OnnxEmbedder(path, preprocess, device=device, output=output)
    if output:
        raise ConfigError(f"--output {output}: {path} is no ONNX file; omit --output")
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


def centers_from_options(
    files: tuple[str, ...], records: "Records", embedder: "Embedder"
) -> 'Centers | Literal["class-mean"]':
    """Open the class centres that ``--centers`` names, or return the word for class means.

    Raises:
        GkdError: if both are named, or the files do not fit the records and the teacher.
    """
    from gkd.pipeline.centers.load import CLASS_MEAN, open_centers
    from gkd.storage.errors import ConfigError

    if CLASS_MEAN in files and len(files) > 1:
        raise ConfigError(
            f"--centers: expected either {CLASS_MEAN} alone or files, got {' '.join(files)}; "
            "give one or the other"
        )
    if CLASS_MEAN in files:
        return CLASS_MEAN
    return open_centers([Path(file) for file in files], records, embedder)


def cache_settings(options: Mapping[str, Any]) -> "CacheSettings":
    """Make the settings of a cache from options of the same names; others keep their defaults.

    Raises:
        ConfigError: if a value is outside its range.
    """
    from gkd.pipeline.settings import CacheSettings, PartitionSettings

    def named(kind: Any) -> dict[str, Any]:
        return {item.name: options[item.name] for item in fields(kind) if item.name in options}

    partition = PartitionSettings(**{**named(PartitionSettings), "draws": _draws(options)})
    return CacheSettings(**{**named(CacheSettings), "partition": partition})


def _draws(options: Mapping[str, Any]) -> Any:
    from gkd.storage.cache.spec import DrawsSpec

    if options["draws"]:
        return DrawsSpec(
            options["draws"],
            options["draw_temperature"],
            options["draw_from"],
            options.get("seed", 0),  # a plan has none: its forecast is the same for every seed
        )
    context = click.get_current_context()
    for name in ("draw_temperature", "draw_from", "seed"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} sets how classes are drawn; give --draws above 0 too")
    return None


def require_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before the work that it is to show.

    Raises:
        ConfigError: naming the missing folder, or the extra that draws.
    """
    from gkd.storage.errors import ConfigError
    from gkd.storage.util.extras import require

    if path.is_dir():
        raise ConfigError(f"--plot {path}: expected a PNG file to write, got a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--plot {path}: there is no folder {path.parent}; create it or choose another path"
        )
    require("matplotlib.figure", "plot")
