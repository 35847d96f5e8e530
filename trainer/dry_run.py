"""What a training would cost, without training: parameters, operations, memory by part, steps."""

import math
import weakref
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
from gkd.storage.records.open import Records
from gkd.trainer.backbones.common import FACE_SIZE
from gkd.trainer.checkpoint import student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data.dataset import JoinedTargets, check_data, chosen_signal
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.device import choose_dtype
from gkd.trainer.distributed import Ranks
from gkd.trainer.head.centers import ClassCenters
from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec
from gkd.trainer.loop import targets_in_use
from gkd.trainer.schedules import make_optimizer

# Two batches tell what grows with the batch from what does not.
PROBES = (2, 4)
# The class layer is measured on so many classes, and grows by as many each.
PROBE_CLASSES = (4096, 8192)
HELD = {"full": "memory-mapped files on disk", "blocks": "two blocks in memory"}


@dataclass(frozen=True)
class DryRun:
    """The costs of a training; bytes, and floating-point operations (a multiply-add counts two).

    parameters       of backbone and head, and how many of them learn
    flops_per_image  of the backbone's forward pass
    flops_per_step   forward and backward of backbone and class layer, for a whole batch: three
                     times the forward, for each product has two for its gradients; of the class
                     layer these are of the centres that learn
    ranks            that share a batch and the class centres; parameters and operations are of all
    memory           of one rank by part, at the height of a step; no workspaces of libraries
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
    """Costs of the training that ``train`` would begin; neither device nor ranks need be there.

    ``targets`` are to be joined for reading in blocks, so that none are copied.

    Raises:
        ConfigError: for data or a student that cannot be trained, as ``train`` raises it.
        SpecMismatchError: for targets of other records.
    """
    targets = targets_in_use(config, records, targets)
    check_data(config, records, targets, world_size=world_size)
    dtype = _dtype(config)
    model = student_backbone(config.student)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.device("meta"):
        head = ClassCenters(records.num_classes, config.student.embedding_dim)
    batch = config.train.batch_size
    plans = BatchSampler(
        len(records), batch, config.train.epochs, config.train.seed, config.data.flip
    )
    flops = backbone_flops(model)
    learning = learning_centers(config, targets, records.num_classes)
    # The first rank has most of the centres.
    centers = len(Ranks(0, world_size).rows(records.num_classes))
    own = learning_centers(config, targets, centers)
    memory = _memory(config, model, head.weight[:centers], own, dtype, world_size)
    dim = config.student.embedding_dim
    return DryRun(
        images=len(records),
        classes=records.num_classes,
        ranks=world_size,
        precision=str(dtype).removeprefix("torch."),
        parameters={
            "backbone": _count(model),
            "head": _count(head),
            "learning": sum(p.numel() for p in (*_learning(model), head.weight)),
        },
        flops_per_image=flops,
        flops_per_step=batch * (3 * flops + 2 * dim * (len(head.weight) + 2 * learning)),
        memory=memory,
        memory_total=sum(memory.values()),
        targets_bytes=_targets_bytes(config, targets),
        targets_held=HELD[config.data.order],
        steps_per_epoch=plans.steps_per_epoch,
        epochs=config.train.epochs,
        total_steps=plans.total_steps,
    )


@torch.no_grad()
def backbone_flops(model: nn.Module) -> int:
    """Operations of the forward pass for one image, counted on a real one of ``PROBES[0]``."""
    images = torch.zeros(PROBES[0], 3, FACE_SIZE, FACE_SIZE)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // PROBES[0]


def activation_bytes(model: nn.Module, batch: int, dtype: torch.dtype, *, last: bool) -> int:
    """What a backbone keeps for its way back, for a batch; measured on two small ones.

    Counts the storages of saved tensors that are neither parameters nor buffers, each once.
    ``last`` says whether images are in channels_last format.
    """
    few, more = (_saved_bytes(model, images, dtype, last=last) for images in PROBES)
    per_image = (more - few) / (PROBES[1] - PROBES[0])
    return round(few + per_image * (batch - PROBES[0]))


def _saved_bytes(model: nn.Module, batch: int, dtype: torch.dtype, *, last: bool) -> int:
    own = {_storage(tensor)[0] for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        place, size = _storage(tensor)
        if place not in own:
            # The tensor too: a freed storage's place is soon another's.
            kept[place] = size, tensor
        return tensor

    images = torch.zeros(batch, 3, FACE_SIZE, FACE_SIZE)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(images)
    return sum(size for size, _ in kept.values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def learning_centers(config: RunConfig, targets: JoinedTargets | None, num_classes: int) -> int:
    """Centres that learn in a step: all, or the sample's at its largest.

    That is where no two images of a batch, and no two draws of an image, have a class in common.
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
    own_learning: int,
    dtype: torch.dtype,
    world_size: int,
) -> dict[str, int]:
    """By part, of a rank that has these ``centers``, of which ``own_learning`` learn in a step."""
    batch = config.train.batch_size // world_size
    backbone, weight = _learning(model), nn.Parameter(centers.detach())
    shared: dict[str, int] = {}
    if world_size > 1:
        # DistributedDataParallel sends copies of the gradients.
        shared["gradients_sent"] = _bytes(backbone)
    learning = [*backbone, weight]
    gradients = _bytes(learning)
    if own_learning < len(weight):
        some = nn.Parameter(centers[:own_learning].detach())
        gradients += _bytes([some]) - _bytes([weight])
        shared["sampled_centers"] = _bytes([some]) + optimizer_bytes(config, [some])
    return {
        **shared,
        "backbone_weights": _bytes([*model.parameters(), *model.buffers()]),
        "class_centers": _bytes([weight]),
        "gradients": gradients,
        "optimizer_state": optimizer_bytes(config, learning),
        # As read, and as floats where the backbone keeps its own, shorter copy.
        "images": batch * 3 * FACE_SIZE**2 * (1 if dtype == torch.float32 else 5),
        "activations": activation_bytes(model, batch, dtype, last=config.train.channels_last),
        # The ranks' embeddings are gathered: each works through the whole batch.
        "class_layer": class_layer_bytes(config, config.train.batch_size, len(weight)),
    }


def class_layer_bytes(config: RunConfig, batch: int, num_classes: int) -> int:
    """What class layer and loss need for a while, above the centres and their gradient.

    The peak of a real forward and backward pass over each number of ``PROBE_CLASSES``, taken
    further in a straight line.
    """
    few, more = (_class_layer_peak(config, batch, classes) for classes in PROBE_CLASSES)
    slope = (more - few) / (PROBE_CLASSES[1] - PROBE_CLASSES[0])
    return int(few + slope * (num_classes - PROBE_CLASSES[0]))


def _class_layer_peak(config: RunConfig, batch: int, num_classes: int) -> int:
    dim = config.student.embedding_dim
    head = ClassCenters(num_classes, dim)
    spec = HeadSpec(margin=config.head.margins, scale=config.head.scale)
    embeddings = torch.ones(batch, dim, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    peak = PeakBytes()
    with peak:
        loss = grouped_margin_loss(embeddings, head.weight, labels, None, spec)
        loss.total.backward()
    return peak.highest - _bytes([head.weight])


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it had at once, those of their storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.highest: int = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {
            id(each.untyped_storage())
            for each in tree_leaves((args, kwargs))
            if isinstance(each, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or storage in self._seen:
            return  # a view, or changed in place
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.highest = max(self.highest, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def optimizer_bytes(config: RunConfig, parameters: list[nn.Parameter]) -> int:
    """Bytes of the optimiser's state: that of a real step, on tensors without memory."""
    shadows = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    optimizer = make_optimizer(config.optimizer, shadows)
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    optimizer.step()
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return _bytes([each for state in states for each in state.values() if isinstance(each, Tensor)])


def _targets_bytes(config: RunConfig, targets: JoinedTargets | None) -> int:
    if targets is None:
        return 0
    assert isinstance(targets.store, ShardStore)
    cache, spec = targets.store.cache, targets.spec

    def size(shards: list[int]) -> int:
        shapes = array_shapes(cache, shards, spec.views).values()
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)

    if config.data.order == "full":
        return size(list(range(spec.num_shards)))
    assert cache.manifest is not None
    entries = [sum(shard.entries.values()) for shard in cache.manifest.shards]
    largest = sorted(range(spec.num_shards), key=lambda shard: -entries[shard])
    return size(largest[: 2 * config.data.block_shards])


def _dtype(config: RunConfig) -> torch.dtype:
    """What the backbone would compute in; without a GPU ``auto`` is judged as on this machine."""
    train = config.train
    gpu = train.device != "cpu" and (train.precision != "auto" or torch.cuda.is_available())
    return choose_dtype(train.precision, torch.device("cuda" if gpu else "cpu"))


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
