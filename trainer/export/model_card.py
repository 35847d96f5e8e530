"""The card of an exported student: what it is, what it was trained on, and how to use it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gkd.storage.cache.card import bullets, code
from gkd.storage.cache.spec import Preprocess, preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import sha256_file, write_file
from gkd.trainer.backbones import default_width
from gkd.trainer.checkpoint import FOLDER, Student, load_student
from gkd.trainer.config import RunConfig, StudentConfig
from gkd.trainer.config_file import to_toml
from gkd.trainer.export.formats import export_onnx, export_safetensors
from gkd.trainer.run_dir import RUN, RunInfo, read_run_info

# Names that arcface_torch's get_model takes.
PUBLISHED_NAMES = {
    "mobilefacenet": "mbf",
    "mbf_large": "mbf_large",
    "iresnet18": "r18",
    "iresnet34": "r34",
    "iresnet50": "r50",
    "iresnet100": "r100",
    "iresnet200": "r200",
    "vit_t": "vit_t",
    "vit_s": "vit_s",
    "vit_b": "vit_b",
    "vit_l": "vit_l_dp005_mask_005",
}
ARCFACE_TORCH = "insightface's `recognition/arcface_torch`"
ADAFACE = "AdaFace (`net.py`, which returns the embedding normalised, and its length)"
EVOLVE = "face.evoLVe"
IR_DIM = 512  # the only embeddings of AdaFace's and face.evoLVe's networks
FORMATS: dict[str, Callable[..., None]] = {".onnx": export_onnx, ".safetensors": export_safetensors}
_NO_LICENCE = (
    "No licence was stated. Ask whoever gave you this model before you use it or pass it on."
)


@dataclass(frozen=True)
class Exported:
    """A model's file and its card."""

    path: Path
    card: Path
    name: str
    bytes: int
    sha256: str

    def to_builtins(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "card": str(self.card),
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
        }


def export_student(
    run: Path, out: Path, *, licence: str | None = None, note: str | None = None
) -> Exported:
    """Write the student of a run folder or a checkpoint to ``out``, and a card beside it.

    The format follows from the name: ``.onnx`` or ``.safetensors``; the card is ``OUT.md``, the
    file's whole name with ``.md`` behind it.

    Raises:
        ConfigError: for another ending, where there is no checkpoint, or it cannot be exported.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(
            f"{out}: expected a name that ends in {' or '.join(FORMATS)}, got "
            f"{out.suffix or 'no ending'}; the ending chooses the format"
        )
    student, described = load_student(run), _described(run)
    name = student.config.student.name
    preprocess = preprocess_preset("arcface")
    FORMATS[out.suffix](student.backbone, out, preprocess=preprocess, name=name)
    sha256, card = sha256_file(out), out.with_name(f"{out.name}.md")
    text = card_text(
        student,
        described,
        preprocess,
        file=out.name,
        sha256=sha256,
        licence=licence,
        note=note,
    )
    write_file(card, text.encode())
    return Exported(out, card, name, out.stat().st_size, sha256)


def card_text(
    student: Student,
    described: RunInfo | None,
    preprocess: Preprocess,
    *,
    file: str,
    sha256: str,
    licence: str | None = None,
    note: str | None = None,
) -> str:
    """The card as Markdown; ``described`` is None for a checkpoint without its run's folder.

    ``licence`` and ``note`` are the maker's own words.
    """
    config = student.config
    parts = [
        f"# {code(file)}",
        f"A face recogniser: {code(config.student.name)}, trained with gkd. It turns an aligned "
        f"face into an embedding of length {config.student.embedding_dim:,}; two faces are "
        "compared by the cosine of their embeddings.",
        note.strip() if note else "",
        "## What it is",
        bullets(_network(student, sha256)),
        "## How it was trained",
        bullets(_training(student, described)),
        f"```toml\n{_settings(config)}```",
        "## How well it does",
        _results(student),
        "## How to use it",
        "Its input is an aligned face of 112x112 pixels: eyes, nose and corners of the mouth moved "
        "to the places that the field uses (arcface_torch's five points) by rotation, scale and "
        f"shift. {_input(preprocess)} For the last bit of accuracy, add the embedding of the "
        "mirror image before you compare.",
        _usage(config.student, file),
        "## Terms",
        licence.strip() if licence else _NO_LICENCE,
        "The terms of the data that it was trained on, and of its teacher, hold besides.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _network(student: Student, sha256: str) -> list[str]:
    config = student.config.student
    width = default_width(config.name) if config.width is None else config.width
    size = sum(parameter.numel() for parameter in student.backbone.parameters())
    pooled = (
        f"; the network pools them to {config.input_size}x{config.input_size} itself"
        if config.input_size != 112
        else ""
    )
    return [
        f"Network: {code(config.name)} of width {width:g}, {size:,} parameters",
        f"Input: float32 [batch, 3, 112, 112]{pooled}",
        f"Output: float32 [batch, {config.embedding_dim}], not normalised",
        f"sha256 of the file: {code(sha256)}",
    ]


def _training(student: Student, described: RunInfo | None) -> list[str]:
    data, config = student.data, student.config
    name = f"{code(described.dataset.name)}, " if described else ""
    lines = [
        f"Data: {name}{data.num_images:,} images of {data.num_classes:,} identities, "
        f"fingerprint {code(data.dataset)}",
        f"Steps: {student.step:,} of {config.train.batch_size:,} images",
    ]
    if not (config.kd.enabled and data.cache_id):
        lines.append("Teacher: none, trained by cross-entropy alone")
    else:
        lines.append(f"Targets: of the cache {code(data.cache_id)}")
        teacher = described.teacher if described else None
        if teacher:
            lines.append(
                f"Teacher: {code(teacher.name)}, {code(teacher.arch)}; sha256 of its weights "
                f"{code(teacher.sha256)}"
            )
    if described:
        versions = ", ".join(f"{package} {each}" for package, each in described.versions.items())
        lines.append(f"Software: {versions}")
    return lines


def _settings(config: RunConfig) -> str:
    """The run's settings as TOML, without the places of its maker's files."""
    names = tuple(Path(path).name for path in config.evaluation.sets)
    evaluation = msgspec.structs.replace(config.evaluation, sets=names)
    return to_toml(msgspec.structs.replace(config, evaluation=evaluation))


def _results(student: Student) -> str:
    if not student.accuracy:
        return "It was not evaluated while it was trained."
    rows = [f"| {code(name)} | {value:.2%} |" for name, value in student.accuracy.items()]
    head = ["| verification set | accuracy over ten folds |", "|---|---|"]
    return "\n".join([*head, *rows])


def _input(preprocess: Preprocess) -> str:
    mean, std = ([f"{value:g}" for value in each] for each in (preprocess.mean, preprocess.std))
    order = "BGR" if preprocess.bgr else "RGB"
    if len(set(mean)) == len(set(std)) == 1:
        return (
            f"Pixels are {order}, and each value x of 0 to 255 becomes (x - {mean[0]}) / {std[0]}."
        )
    return (
        f"Pixels are {order}; each value of 0 to 255 less {', '.join(mean)}, divided by "
        f"{', '.join(std)}."
    )


def _usage(config: StudentConfig, file: str) -> str:
    if file.endswith(".onnx"):
        return (
            _python(
                "import numpy, onnxruntime",
                "from PIL import Image",
                f"session = onnxruntime.InferenceSession({json.dumps(file)})",
                'pixels = numpy.asarray(Image.open("face.png").convert("RGB"), numpy.float32)',
                "images = ((pixels - 127.5) / 127.5).transpose(2, 0, 1)[None]",
                'embeddings = session.run(["embedding"], {"input": images})[0]',
            )
            + "\n\nThe file's metadata says the same to programs: `input_shape`, `channel_order`, "
            + ("`preprocess_mean`, `preprocess_std` and `embedding_dim`.")
        )
    published = _published(config)
    if published is None:
        return (
            "No published network is of this width, input size or embedding: export this student "
            "as ONNX to use it without gkd. With gkd:\n\n"
        ) + _python(
            "from pathlib import Path",
            "from gkd.trainer.backbones import load_backbone",
            f'model = load_backbone("auto", Path({json.dumps(file)})).module',
        )
    codebase, built = published
    return (
        f"The weights have the names of {codebase}, and load into its network. With that folder "
        "on Python's path:\n\n"
        + _python(
            "from safetensors.torch import load_file",
            *built,
            f"model.load_state_dict(load_file({json.dumps(file)}))",
            "model.eval()",
        )
        + "\n\nSafetensors files hold nothing but tensors: no code of the file runs."
    )


def _published(config: StudentConfig) -> tuple[str, tuple[str, str]] | None:
    """The codebase that has this network, and lines that build it there; None where none has."""
    width = default_width(config.name) if config.width is None else config.width
    if config.input_size != 112:
        return None
    if width == default_width(config.name):
        if config.name in PUBLISHED_NAMES:
            name = PUBLISHED_NAMES[config.name]
            return ARCFACE_TORCH, (
                "from backbones import get_model",
                f'model = get_model("{name}", fp16=False, num_features={config.embedding_dim})',
            )
        if config.embedding_dim != IR_DIM:
            return None
        name = config.name.removeprefix("evolve_").upper()
        if name.lower() == config.name:
            return ADAFACE, (f"from net import {name}", f"model = {name}(input_size=(112, 112))")
        return EVOLVE, (f"from backbone.model_irse import {name}", f"model = {name}([112, 112])")
    if config.name == "mobilefacenet" and width == int(width):
        return ARCFACE_TORCH, (
            "from backbones.mobilefacenet import MobileFaceNet",
            f"model = MobileFaceNet(num_features={config.embedding_dim}, scale={int(width)})",
        )
    return None


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _described(run: Path) -> RunInfo | None:
    """run.json of the run that a folder or a checkpoint is of; None without one."""
    home = run if run.is_dir() else run.absolute().parent.parent
    if not (home / RUN).is_file() or not (home / FOLDER).is_dir():
        return None
    return read_run_info(home)
