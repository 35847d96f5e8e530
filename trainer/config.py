"""What decides a training run: one TOML file with sections, any key of it set from outside.

Defaults are the published recipe of grouped distillation for MobileFaceNet (Zhao et al., AAAI
2023). Every key is documented at its section below.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gkd.storage.cache.spec import MAX_SCALE
from gkd.storage.errors import ConfigError
from gkd.trainer.backbones.build import BackboneName
from gkd.trainer.head.margin import Margin

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
CountOrNone = Annotated[int, Meta(ge=0)]
# Far beyond any network that people train: a slip of the hand is told, not allocated.
EmbeddingDim = Annotated[int, Meta(ge=1, le=8192)]
Width = Annotated[float, Meta(gt=0, le=8)]
# Sixteen times the field's: from there on a softmax is an argmax.
Scale = Annotated[float, Meta(gt=0, le=MAX_SCALE)]
Epochs = Annotated[float, Meta(gt=0, le=1e6)]
# BatchNorm over the batch needs two images.
BatchSize = Annotated[int, Meta(ge=2)]
# What torch and numpy both take.
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Signal = Literal["auto", "group", "draws", "hybrid"]


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[data]``.

    flip     mirror half of the images at random; each takes the targets of the view it shows
    workers  processes that decode and look targets up, at most one a core; 0 does it in the
             training process
    order    full: each epoch is one permutation, targets come from memory-mapped files;
             blocks: shards are read from the cache in random order, ``block_shards`` of them at a
             time, and shuffled within, for nodes without the disk. Where records stand sorted by
             identity, a block has the identities of its shards only. Without distillation full
    block_shards  shards of the cache in a block; two blocks are in memory
    empty_classes  refuse classes without an image, or keep them: filtered records leave some, and
             their centres then learn from the targets, and from being told from the others, alone
    """

    flip: bool = True
    workers: CountOrNone = 4
    order: Literal["full", "blocks"] = "full"
    block_shards: Count = 4
    empty_classes: Literal["refuse", "keep"] = "refuse"


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[student]``.

    name           mobilefacenet, mbf_large; iresnet18, 34, 50, 100 or 200; vit_t, s, b or l; ir_18,
                   34, 50, 101, 152 or 200, and evolve_ir_50, 101 or 152 (ir_se_50 and so on with
                   squeeze and excitation): see ``gkd.trainer.backbones``
    width          multiplier of the channels; by default as published: 2 for mobilefacenet, 4 for
                   mbf_large, else 1
    embedding_dim  length of an embedding
    input_size     112, or 56 or 28: the network pools its 112x112 images to that first
    """

    name: BackboneName = "mobilefacenet"
    width: Width | None = None
    embedding_dim: EmbeddingDim = 512
    input_size: Literal[112, 56, 28] = 112


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[head]``: logits are ``scale * (cos(m1 * theta + m2) - m3)`` at the label.

    kind        cosface (1, 0, margin), arcface (1, margin, 0) or combined (m1, m2, m3)
    margin      of cosface (by default 0.4) and arcface (by default 0.5)
    scale       of all logits
    m1, m2, m3  of combined
    sample_rate share of the classes that a step works with, beside those of its batch's labels and
                primary groups, which always take part: 0.1 to 0.3 beyond some 600,000 classes
    """

    kind: Literal["cosface", "arcface", "combined"] = "cosface"
    margin: NonNegative | None = None
    scale: Scale = 64.0
    m1: Positive = 1.0
    m2: NonNegative = 0.0
    m3: NonNegative = 0.0
    sample_rate: Rate = 1.0

    @property
    def margins(self) -> Margin:
        """The margins (m1, m2, m3) that ``kind`` means."""
        match self.kind:
            case "cosface":
                return Margin(m3=0.4 if self.margin is None else self.margin)
            case "arcface":
                return Margin(m2=0.5 if self.margin is None else self.margin)
            case "combined":
                return Margin(self.m1, self.m2, self.m3)


class KdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[kd]``: loss = CE + ramp * T^2 * mean(w_binary * Binary + w_primary * Primary).

    enabled      False trains by cross-entropy alone
    signal       group: the stored primary groups; draws: the drawn classes in their place;
                 hybrid: both, the stored entries exactly and the draws for the rest; auto: draws
                 where the cache has some, else group. Draws from all classes teach the whole
                 divergence: Primary is KL(p||q), Binary is 0. See ``gkd.trainer.head.loss``
    temperature  T, one of those that the cache holds
    w_binary     weight of the primary mass against the secondary mass
    w_primary    weight of the distribution within the primary group
    ramp         share of the training over which distillation rises from 0 to its full weight
    """

    enabled: bool = True
    signal: Signal = "auto"
    temperature: Positive = 4.0
    w_binary: NonNegative = 1.0
    w_primary: NonNegative = 1.0
    ramp: Fraction = 0.5


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[optimizer]``.

    kind          sgd or adamw
    lr            learning rate at its height, for the whole batch
    momentum      of sgd
    nesterov      of sgd
    weight_decay  on every parameter, normalisation and class centres too, as arcface_torch does
    clip_norm     greatest norm of the backbone's gradient; 0 for no clipping
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    clip_norm: NonNegative = 5.0


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[schedule]``: of the learning rate, step by step.

    kind           cosine, poly or step
    warmup_epochs  epochs over which the rate rises linearly from 0
    final_lr       where cosine and poly end
    power          of poly: the remaining share of the steps to this power
    milestones     of step: epochs after which the rate falls
    gamma          of step: the factor it falls by
    """

    kind: Literal["cosine", "poly", "step"] = "cosine"
    warmup_epochs: NonNegative = 4.0
    final_lr: NonNegative = 2.5e-7
    power: Positive = 1.0
    milestones: tuple[Epochs, ...] = (10.0, 16.0, 18.0)
    gamma: Positive = 0.1


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[train]``.

    epochs         times that each image is seen; the last incomplete batch of an epoch is dropped
    batch_size     images a step, of all ranks together, at least 2 a rank
    device         auto (cuda where there is one), cpu or cuda
    precision      of the backbone: float32, bfloat16, float16, or auto (bfloat16 on a GPU that has
                   it, else float32); the class layer is float32, and its products TF32 where
                   a GPU's backbone is in half precision, which rounds more
    seed           of weights, order and flips
    log_every      steps between two lines of metrics.jsonl; each epoch's end has one too
    max_skipped    steps in a row whose loss or gradients are not finite, after which it stops
    channels_last  memory format of the backbone
    compile        torch.compile for the exponentials of the class layer: one kernel for several on
                   a GPU, fewer on a CPU too; the first step waits for a compiler
    gradient_hook  what ranks send each other of the backbone's gradient: float32, or rounded to
                   float16 or bfloat16, half of the bytes
    """

    epochs: Count = 20
    batch_size: BatchSize = 128
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: Seed = 0
    log_every: Count = 50
    max_skipped: Count = 10
    channels_last: bool = True
    compile: bool = False
    gradient_hook: Literal["float32", "float16", "bfloat16"] = "float32"


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[evaluation]``.

    sets          verification sets, paths of .bin files
    every_epochs  epochs between two evaluations; there is one at the end as well
    """

    sets: tuple[str, ...] = ()
    every_epochs: Count = 1


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[checkpoint]``: last.pt and, where there are verification sets, best.pt.

    every_epochs  epochs between two checkpoints, may be a fraction; there is one at the end as well
    keep          older checkpoints that stay beside last.pt, as step_NUMBER.pt
    """

    every_epochs: Epochs = 1.0
    keep: CountOrNone = 0


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole training run, one field a section."""

    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    head: HeadConfig = HeadConfig()
    kd: KdConfig = KdConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


# Keys that may differ between the parts of one run: they change no weight.
FREE_KEYS = ("data.workers", "train.log_every", "train.max_skipped", "evaluation.", "checkpoint.")


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a TOML file and ``section.key=value`` overrides describe; later ones win.

    Values are TOML; a bare word is a string.

    Raises:
        ConfigError: naming the place and the key, for a file that is no TOML, an unknown key, a
            value of another type or out of range, or keys that cannot go together.
    """
    content: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        content = _read(path)
        _require_known(content, str(path))
        origins = {key: str(path) for key, _ in _flat(content)}
    for override in overrides:
        key, value = _parse(override)
        section, _, name = key.partition(".")
        _require_known({section: {name: value}}, "--set")
        content.setdefault(section, {})[name] = value
        origins[key] = "--set"
    try:
        config = msgspec.convert(content, RunConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), content, origins)) from error
    _require_finite(config, origins)
    _require_consistent(config, origins)
    return config


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; ``load_config`` reads it back to an equal value."""
    lines: list[str] = []
    for section, keys in msgspec.to_builtins(config).items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value is not None]
    return "\n".join(lines[1:]) + "\n"


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """``key: ours, theirs`` for every key that would change the weights."""
    old = dict(_flat(msgspec.to_builtins(ours)))
    new = dict(_flat(msgspec.to_builtins(theirs)))
    return [
        f"{key}: {old[key]!r}, now {new[key]!r}"
        for key in old
        if old[key] != new[key] and not key.startswith(FREE_KEYS)
    ]


def _flat(content: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for section, keys in content.items():
        for key, value in keys.items():
            yield f"{section}.{key}", value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    section, _, name = key.strip().partition(".")
    if not (equals and section and name):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. train.epochs=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A shell eats quotes, so a word or a path needs none.
        value = text.strip()
    return key.strip(), value


def _require_known(content: Mapping[str, Any], where: str) -> None:
    known = {section: set(keys) for section, keys in msgspec.to_builtins(RunConfig()).items()}
    for section, keys in content.items():
        if section not in known:
            raise ConfigError(f"{where}: unknown section [{section}]{_nearest(section, known)}")
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{where}: {section}: expected a section, got {keys!r}")
        for key in keys:
            if key not in known[section]:
                every = {f"{s}.{k}" for s, names in known.items() for k in names}
                hint = _nearest(f"{section}.{key}", every)
                raise ConfigError(f"{where}: unknown key {section}.{key}{hint}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"


def _explain(message: str, content: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Msgspec's "Expected `int` >= 1 - at `$.train.epochs`" with place and value.

    A place in a list is ``$.schedule.milestones[1]``.
    """
    expected, _, place = message.partition(" - at `$.")
    place = place.rstrip("`")
    key, _, element = place.partition("[")
    section, _, name = key.partition(".")
    value = content[section][name]
    if element:
        value = value[int(element.rstrip("]"))]
    expected = expected.partition(", got")[0].replace("`", "").replace("Expected", "expected")
    if expected == "expected array":
        example = _toml(value) if isinstance(value, str | int | float) else "..."
        expected = f"expected a list, {key}=[{example}]"
    if expected.startswith("Invalid enum"):
        expected = f"expected one of {', '.join(map(repr, _choices(section, name)))}"
    return f"{origins[key]}: {place}: {expected}, got {value!r}"


def _choices(section: str, name: str) -> tuple[Any, ...]:
    table = next(f.type for f in msgspec.structs.fields(RunConfig) if f.name == section)
    kind = next(f.type for f in msgspec.structs.fields(table) if f.name == name)
    return tuple(kind.__args__)


def _require_finite(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Refuse what TOML takes for a number: inf and nan."""
    for key, value in _flat(msgspec.to_builtins(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{origins[key]}: {key}: expected a finite number, got {value!r}")


def _require_consistent(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Refuse what each key alone allows, but not together."""
    head, optimizer, schedule = config.head, config.optimizer, config.schedule
    faults = {
        "head.margin": (
            head.kind == "combined" and head.margin is not None,
            "head.kind combined takes head.m1, head.m2 and head.m3",
        ),
        "optimizer.nesterov": (
            optimizer.kind == "sgd" and optimizer.nesterov and optimizer.momentum == 0,
            "Nesterov needs optimizer.momentum above 0; set it, or optimizer.nesterov=false",
        ),
        "schedule.warmup_epochs": (
            schedule.warmup_epochs >= config.train.epochs,
            f"expected less than train.epochs ({config.train.epochs}), got "
            f"{schedule.warmup_epochs:g}",
        ),
        "schedule.final_lr": (
            schedule.final_lr > optimizer.lr,
            f"expected at most optimizer.lr ({optimizer.lr:g}), got {schedule.final_lr:g}",
        ),
    }
    unset = HeadConfig()
    for name in ("m1", "m2", "m3"):
        faults[f"head.{name}"] = (
            head.kind != "combined" and getattr(head, name) != getattr(unset, name),
            f"only head.kind combined takes it; {head.kind} takes head.margin",
        )
    for key, (wrong, why) in faults.items():
        if wrong:
            raise ConfigError(f"{origins.get(key, 'configuration')}: {key}: {why}")


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            # JSON's escapes are TOML's.
            return msgspec.json.encode(value).decode()
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
