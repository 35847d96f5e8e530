"""The cost of a training without training: parameters, operations, memory by part, steps."""

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gkd.storage.reading.flat_arrays import array_shapes
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Records
from gkd.trainer.backbones.common import FACE_SIZE
from gkd.trainer.checkpoint import student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data.checks import check_data
from gkd.trainer.data.dataset import JoinedTargets, chosen_signal
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.device import choose_dtype
from gkd.trainer.distributed import Ranks
from gkd.trainer.head.centers import ClassCenters
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec
from gkd.trainer.schedules import make_optimizer

# Two batch sizes separate what grows with the batch from what does not.
PROBES = (2, 4)
# The class layer is measured with these numbers of classes, and extrapolated linearly.
PROBE_CLASSES = (4096, 8192)
HELD = {"full": "memory-mapped files on disk", "blocks": "two blocks in memory"}


@dataclass(frozen=True)
class DryRun:
    """The cost of a training; in bytes and floating-point operations (a multiply-add is two).

    parameters       of backbone and head, and how many of them are trained ("trainable")
    flops_per_image  of the backbone's forward pass
    flops_per_step   forward and backward of backbone and class layer, for a whole batch: three
                     times the forward, for each product has two for its gradients; of the class
                     layer those of the trained centres
    ranks            that share a batch and the class centres; parameters and operations are of all
    memory           of one rank by part, at the peak of a step; without workspaces of libraries
    targets_bytes    of the targets in use, held as ``targets_held`` says
    """

    images: int
    classes: int
    ranks: int
    precision: str
    parameters: dict[str, int]
    flops_per_image: int
    flops_per_step: int
    memory: dict[str, int]
    memory_total: int
    targets_bytes: int
    targets_held: str
    steps_per_epoch: int
    epochs: int
    total_steps: int


def dry_run(
    config: RunConfig, records: Records, targets: JoinedTargets | None, *, world_size: int = 1
) -> DryRun:
    """Cost of the training that ``train`` would start; needs neither its device nor its ranks.

    ``targets`` must be joined for reading in blocks, so that none are copied.

    Raises:
        ConfigError: if data or student cannot be trained, as ``train`` raises it.
        SpecMismatchError: if the targets are of other records.
    """
    targets = check_data(config, records, targets, world_size=world_size)
    train, dim = config.train, config.student.embedding_dim
    # On a machine without a GPU, ``auto`` is decided as on this machine.
    gpu = train.device != "cpu" and (train.precision != "auto" or torch.cuda.is_available())
    dtype = choose_dtype(train.precision, torch.device("cuda" if gpu else "cpu"))
    model = student_backbone(config.student)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    with torch.device("meta"):
        head = ClassCenters(records.num_classes, dim)
    sampler = BatchSampler(
        len(records), train.batch_size, train.epochs, train.seed, config.data.flip
    )
    flops = backbone_flops(model)
    trained = trained_centers(config, targets, records.num_classes)
    # The first rank has the most centres.
    centers = len(Ranks(0, world_size).rows(records.num_classes))
    own = trained_centers(config, targets, centers)
    memory = _memory(config, model, head.weight[:centers], own, dtype, world_size)
    return DryRun(
        images=len(records),
        classes=records.num_classes,
        ranks=world_size,
        precision=str(dtype).removeprefix("torch."),
        parameters={
            "backbone": _count(model.parameters()),
            "head": _count(head.parameters()),
            "trainable": _count([*_trainable(model), head.weight]),
        },
        flops_per_image=flops,
        flops_per_step=train.batch_size * (3 * flops + 2 * dim * (len(head.weight) + 2 * trained)),
        memory=memory,
        memory_total=sum(memory.values()),
        targets_bytes=_targets_bytes(config, targets),
        targets_held=HELD[config.data.order],
        steps_per_epoch=sampler.steps_per_epoch,
        epochs=train.epochs,
        total_steps=sampler.total_steps,
    )


@torch.no_grad()
def backbone_flops(model: nn.Module) -> int:
    """Operations of the forward pass for one image, counted on a real batch."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(PROBES[0], 3, FACE_SIZE, FACE_SIZE))
    return int(counter.get_total_flops()) // PROBES[0]


def activation_bytes(model: nn.Module, batch: int, dtype: torch.dtype, *, last: bool) -> int:
    """What a backbone keeps for the backward pass of a batch; measured on two small batches.

    Counts each storage of saved tensors that are neither parameters nor buffers once. ``last``:
    images are in channels_last format.
    """
    few, more = (_saved_bytes(model, images, dtype, last=last) for images in PROBES)
    return round(few + (more - few) / (PROBES[1] - PROBES[0]) * (batch - PROBES[0]))


def _saved_bytes(model: nn.Module, batch: int, dtype: torch.dtype, *, last: bool) -> int:
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        # The tensor is kept too: the address of a freed storage is soon used again.
        if _address(tensor) not in own:
            saved[_address(tensor)] = tensor
        return tensor

    images = torch.zeros(batch, 3, FACE_SIZE, FACE_SIZE)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def trained_centers(config: RunConfig, targets: JoinedTargets | None, num_classes: int) -> int:
    """Centres that a step trains: all, or the largest possible sample.

    It is largest if no two images of a batch, and no two draws of an image, share a class.
    """
    rate, wanted = config.head.sample_rate, config.train.batch_size
    if targets is not None:
        wanted += int(wanted * _entries_per_image(config, targets))
    wanted = min(wanted, num_classes)
    return wanted + math.ceil(rate * (num_classes - wanted))


def _entries_per_image(config: RunConfig, targets: JoinedTargets) -> Fraction:
    """Mean entries of the signal in use: those of the stored groups, the draws, or both."""
    assert isinstance(targets.store, ShardStore)
    manifest = targets.store.cache.manifest
    assert manifest is not None
    signal, draws = chosen_signal(config.kd.signal, targets.spec), targets.spec.draws
    groups = manifest.num_samples * len(manifest.entries)
    stored = 0 if signal == "draws" else sum(manifest.entries.values())
    drawn = 0 if signal == "group" or draws is None else draws.count
    return Fraction(stored, groups) + drawn


def _memory(
    config: RunConfig,
    model: nn.Module,
    centers: Tensor,
    trained: int,
    dtype: torch.dtype,
    world_size: int,
) -> dict[str, int]:
    """By part, of a rank that has these ``centers``, of which a step trains ``trained``."""
    batch = config.train.batch_size // world_size
    backbone, weight = _trainable(model), nn.Parameter(centers.detach())
    extra: dict[str, int] = {}
    if world_size > 1:
        # DistributedDataParallel sends copies of the gradients.
        extra["gradients_sent"] = _bytes(backbone)
    gradients = _bytes([*backbone, weight])
    if trained < len(weight):
        sample = nn.Parameter(centers[:trained].detach())
        gradients += _bytes([sample]) - _bytes([weight])
        extra["sampled_centers"] = _bytes([sample]) + optimizer_bytes(config, [sample])
    return {
        **extra,
        "backbone_weights": _bytes([*model.parameters(), *model.buffers()]),
        "class_centers": _bytes([weight]),
        "gradients": gradients,
        "optimizer_state": optimizer_bytes(config, [*backbone, weight]),
        # As read, and as floats if the backbone keeps its own, shorter copy.
        "images": batch * 3 * FACE_SIZE**2 * (1 if dtype == torch.float32 else 5),
        "activations": activation_bytes(model, batch, dtype, last=config.train.channels_last),
        # The ranks' embeddings are gathered: each computes with the whole batch.
        "class_layer": class_layer_bytes(config, config.train.batch_size, len(weight)),
    }


def class_layer_bytes(config: RunConfig, batch: int, num_classes: int) -> int:
    """What class layer and loss allocate in addition to the centres and their gradient.

    The peak of a real forward and backward pass for each number of ``PROBE_CLASSES``,
    extrapolated linearly.
    """
    few, more = (_class_layer_peak(config, batch, classes) for classes in PROBE_CLASSES)
    slope = (more - few) / (PROBE_CLASSES[1] - PROBE_CLASSES[0])
    return int(few + slope * (num_classes - PROBE_CLASSES[0]))


def _class_layer_peak(config: RunConfig, batch: int, num_classes: int) -> int:
    centers = ClassCenters(num_classes, config.student.embedding_dim)
    spec = HeadSpec(margin=config.head.margins, scale=config.head.scale)
    embeddings = torch.ones(batch, config.student.embedding_dim, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    peak = PeakBytes()
    with peak:
        grouped_margin_loss(embeddings, centers.weight, labels, None, spec).total.backward()
    return peak.highest - _bytes([centers.weight])


class PeakBytes(TorchDispatchMode):
    """The maximum of the bytes held at once by storages of tensors created under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.highest: int = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # Not those of views, or of tensors changed in place.
            if id(storage) not in given and storage not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.highest = max(self.highest, self.now)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def optimizer_bytes(config: RunConfig, parameters: list[nn.Parameter]) -> int:
    """Bytes of the optimizer's state: that of a real step, on tensors without memory."""
    shadows = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    optimizer = make_optimizer(config.optimizer, shadows)
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    optimizer.step()
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return _bytes(v for state in states for v in state.values() if isinstance(v, Tensor))


def _targets_bytes(config: RunConfig, targets: JoinedTargets | None) -> int:
    if targets is None:
        return 0
    assert isinstance(targets.store, ShardStore)
    cache, spec = targets.store.cache, targets.spec
    assert cache.manifest is not None
    shards = list(range(spec.num_shards))
    if config.data.order == "blocks":
        entries = [sum(shard.entries.values()) for shard in cache.manifest.shards]
        largest = sorted(shards, key=lambda shard: -entries[shard])
        shards = largest[: 2 * config.data.block_shards]
    shapes = array_shapes(cache, shards, spec.views).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
