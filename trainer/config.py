"""The configuration of a training: one TOML file with sections, in which any key can be overridden.

The defaults are the published recipe of grouped distillation for MobileFaceNet (Zhao et al., AAAI
2023). The docstring of each section documents its keys, one row per key: name, two or more
spaces, description; further lines of a description are indented to its column.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gkd.storage.cache.spec import MAX_SCALE
from gkd.trainer.backbones.build import BackboneName
from gkd.trainer.head.margin import Margin

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
CountOrNone = Annotated[int, Meta(ge=0)]
# Far beyond any network in use: a typing mistake is reported before memory is allocated.
EmbeddingDim = Annotated[int, Meta(ge=1, le=8192)]
Width = Annotated[float, Meta(gt=0, le=8)]
# Sixteen times the usual value: from there on a softmax is an argmax.
Scale = Annotated[float, Meta(gt=0, le=MAX_SCALE)]
Epochs = Annotated[float, Meta(gt=0, le=1e6)]
# BatchNorm over the batch needs two images.
BatchSize = Annotated[int, Meta(ge=2)]
# The range that torch and numpy both accept.
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Signal = Literal["auto", "group", "draws", "hybrid"]


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[data]``: how images and targets are read.

    flip           mirror half of the images at random; each gets the targets of the view it shows
    workers        processes that decode images and look up targets, at most one per core; with 0
                   the training process does it
    order          full: each epoch is one permutation, targets come from memory-mapped files;
                   blocks: shards are read from the cache in random order, ``block_shards`` of them
                   at a time, and shuffled within, for nodes without room on disk. If records are
                   sorted by identity, a block contains the identities of its shards only. Without
                   distillation always full
    block_shards   shards of the cache in a block; two blocks are in memory
    empty_classes  refuse classes without images, or keep them: filtered records leave some, and
                   their centres then learn only from the targets and as negatives of other classes
    cache_id       id of the only cache to train from, as `gkd targets info` prints it; empty for
                   any
    """

    flip: bool = True
    workers: CountOrNone = 4
    order: Literal["full", "blocks"] = "full"
    block_shards: Count = 4
    empty_classes: Literal["refuse", "keep"] = "refuse"
    cache_id: str = ""


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[student]``: the backbone.

    name           mobilefacenet, mbf_large; iresnet18, 34, 50, 100 or 200; vit_t, s, b or l; ir_18,
                   34, 50, 101, 152 or 200, and evolve_ir_50, 101 or 152 (ir_se_50 and so on with
                   squeeze and excitation): see ``gkd.trainer.backbones``
    width          multiplier of the channels; by default as published: 2 for mobilefacenet, 4 for
                   mbf_large, else 1
    embedding_dim  length of an embedding
    input_size     112, or 56 or 28: the network first pools its 112x112 images to that size
    """

    name: BackboneName = "mobilefacenet"
    width: Width | None = None
    embedding_dim: EmbeddingDim = 512
    input_size: Literal[112, 56, 28] = 112


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[head]``: logits are ``scale * (cos(m1 * theta + m2) - m3)`` at the label.

    kind         cosface (1, 0, margin), arcface (1, margin, 0) or combined (m1, m2, m3)
    margin       of cosface (default 0.4) or arcface (default 0.5)
    scale        of all logits
    m1           of combined
    m2           of combined
    m3           of combined
    sample_rate  share of the classes that a step computes with, in addition to those of its batch's
                 labels and primary groups, which always take part: 0.1 to 0.3 beyond some 600,000
                 classes
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

    enabled      false trains with cross-entropy alone
    signal       group: the stored primary groups; draws: the drawn classes instead; hybrid: both,
                 the stored entries exactly and the draws for the rest; auto: draws if the cache
                 has them, else group. Draws from all classes estimate the whole divergence: Primary
                 is KL(p||q), Binary is 0. See ``gkd.trainer.head.loss``
    temperature  T, one of those stored in the cache
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
    """``[optimizer]``: how weights are updated.

    kind          sgd or adamw
    lr            peak learning rate, for the whole batch
    momentum      of sgd
    nesterov      of sgd
    weight_decay  of every parameter, including normalisation and class centres, as in arcface_torch
    clip_norm     maximum norm of the backbone's gradient; 0 for no clipping
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
    warmup_epochs  epochs over which the rate rises linearly from 0; by default 4, or a fifth of
                   train.epochs if that is 4 or fewer
    final_lr       where cosine and poly end
    power          of poly: exponent of the remaining share of the steps
    milestones     of step: epochs after which the rate falls
    gamma          of step: the factor at each milestone
    """

    kind: Literal["cosine", "poly", "step"] = "cosine"
    warmup_epochs: NonNegative = 4.0
    final_lr: NonNegative = 2.5e-7
    power: Positive = 1.0
    milestones: tuple[Epochs, ...] = (10.0, 16.0, 18.0)
    gamma: Positive = 0.1


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[train]``: the training itself.

    epochs           times that each image is seen; the last incomplete batch of an epoch is dropped
    batch_size       images per step, of all ranks together, at least 2 per rank
    device           auto (cuda if there is a GPU), cpu or cuda
    precision        of the backbone: float32, bfloat16, float16, or auto (bfloat16 on a GPU that
                     supports it, else float32); the class layer is float32, its products TF32 if
                     a GPU's backbone is in half precision, which rounds more
    seed             of weights, order and flips
    log_every        steps between two lines of metrics.jsonl; each epoch's end has one too
    max_skipped      steps in a row whose loss or gradients are not finite, after which it stops
    channels_last    memory format of the backbone
    compile          torch.compile for the exponentials of the class layer: one kernel instead of
                     several on a GPU, fewer on a CPU too; the first step waits for the compiler
    allreduce_dtype  how ranks send each other the backbone's gradient: in float32, or rounded to
                     float16 or bfloat16, which takes half of the bytes
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
    allreduce_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[evaluation]``: verification during the training.

    sets          verification sets, paths of .bin files
    every_epochs  epochs between two evaluations; there is one at the end as well
    """

    sets: tuple[str, ...] = ()
    every_epochs: Count = 1


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[checkpoint]``: last.pt and, if there are verification sets, best.pt.

    every_epochs  epochs between two checkpoints, may be a fraction; there is one at the end as well
    keep          number of older checkpoints to keep beside last.pt, as step_NUMBER.pt
    """

    every_epochs: Epochs = 1.0
    keep: CountOrNone = 0


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run, one field per section."""

    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    head: HeadConfig = HeadConfig()
    kd: KdConfig = KdConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
