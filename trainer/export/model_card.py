"""The card of an exported student: what it is, what it was trained on, and how to use it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec

from gkd.storage.cache.card import code, plain, stated
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import sha256_file, write_file
from gkd.trainer.backbones import default_width
from gkd.trainer.checkpoint import FOLDER, Student, load_student
from gkd.trainer.config import StudentConfig
from gkd.trainer.config_file import to_toml
from gkd.trainer.export.formats import export_onnx, export_safetensors
from gkd.trainer.run_dir import RUN, RunInfo, read_run_info

# Names in arcface_torch's get_model.
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
IR_DIM = 512  # the only embedding length of AdaFace's and face.evoLVe's networks
FORMATS: dict[str, Callable[..., None]] = {".onnx": export_onnx, ".safetensors": export_safetensors}
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


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
    file's full name followed by ``.md``.

    Raises:
        ConfigError: if the name ends otherwise, there is no checkpoint, or it cannot be exported.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(
            path=out,
            expected=f"a name that ends in {' or '.join(FORMATS)}",
            got=out.suffix or "no ending",
            remedy="the ending determines the format",
        )
    student, run_info = load_student(run), _run_info_of(run)
    name = student.config.student.name
    FORMATS[out.suffix](student.backbone, out, preprocess=preprocess_preset("arcface"), name=name)
    sha256, card = sha256_file(out), out.with_name(f"{out.name}.md")
    text = card_text(student, run_info, file=out.name, sha256=sha256, licence=licence, note=note)
    write_file(card, text.encode())
    return Exported(out, card, name, out.stat().st_size, sha256)


def card_text(
    student: Student,
    run_info: RunInfo | None,
    *,
    file: str,
    sha256: str,
    licence: str | None = None,
    note: str | None = None,
) -> str:
    """The card as Markdown; ``run_info`` is None for a checkpoint without its run folder.

    ``licence`` and ``note`` are the publisher's own words.
    """
    config = student.config
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "plain": plain, "stated": stated, "quoted": json.dumps}
    # Without the paths of the publisher's files.
    sets = tuple(Path(path).name for path in config.evaluation.sets)
    evaluation = msgspec.structs.replace(config.evaluation, sets=sets)
    return environment.get_template(TEMPLATE.name).render(
        file=file,
        sha256=sha256,
        licence=licence,
        note=note,
        config=config,
        settings=to_toml(msgspec.structs.replace(config, evaluation=evaluation)),
        width=_width(config.student),
        parameters=sum(parameter.numel() for parameter in student.backbone.parameters()),
        data=student.data,
        step=student.step,
        accuracy=student.accuracy,
        run_info=run_info,
        published=_published(config.student),
    )


class Published(NamedTuple):
    """The codebase that publishes a network, and the lines that build it there."""

    codebase: str
    import_line: str
    build_line: str


def _published(config: StudentConfig) -> Published | None:
    """Where a network is published; None if nowhere."""
    name, dim, width = config.name, config.embedding_dim, _width(config)
    if config.input_size != 112:
        return None
    if width != default_width(name):
        if name != "mobilefacenet" or width != int(width):
            return None
        return Published(
            ARCFACE_TORCH,
            "from backbones.mobilefacenet import MobileFaceNet",
            f"model = MobileFaceNet(num_features={dim}, scale={int(width)})",
        )
    if name in PUBLISHED_NAMES:
        return Published(
            ARCFACE_TORCH,
            "from backbones import get_model",
            f'model = get_model("{PUBLISHED_NAMES[name]}", fp16=False, num_features={dim})',
        )
    if dim != IR_DIM:
        return None
    network = name.removeprefix("evolve_").upper()
    if name.startswith("evolve_"):
        codebase, module, size = EVOLVE, "backbone.model_irse", "[112, 112]"
    else:
        codebase, module, size = ADAFACE, "net", "input_size=(112, 112)"
    return Published(codebase, f"from {module} import {network}", f"model = {network}({size})")


def _width(config: StudentConfig) -> float:
    return default_width(config.name) if config.width is None else config.width


def _run_info_of(run: Path) -> RunInfo | None:
    """run.json of a run folder, or of the one that a checkpoint is in; None if there is none."""
    home = run if run.is_dir() else run.absolute().parent.parent
    if not (home / RUN).is_file() or not (home / FOLDER).is_dir():
        return None
    return read_run_info(home)
