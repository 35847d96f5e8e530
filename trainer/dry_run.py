"""The cost of a training without training: parameters, operations, memory by part, steps."""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gkd.storage.reading.flat_arrays import array_shapes
from gkd.storage.reading.shard_store import ShardStore
from gkd.storage.records.base import Records
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.backbones.common import FACE_SIZE
from gkd.trainer.checkpoint import student_backbone
from gkd.trainer.config import RunConfig
from gkd.trainer.data.checks import check_data
from gkd.trainer.data.dataset import JoinedTargets, chosen_signal
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.data.shared_memory import PREFETCH, batch_bytes, needed
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
    shared_memory    of one rank, for the data workers to pass batches through /dev/shm
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
    shared_memory: int
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
        weight = ClassCenters(records.num_classes, dim).weight
    sampler = BatchSampler(
        len(records), train.batch_size, train.epochs, train.seed, config.data.flip
    )
    flops = backbone_flops(model)
    trained = trained_centers(config, targets, records.num_classes)
    # The first rank has the most centres.
    centers = weight[: len(Ranks(0, world_size).rows(records.num_classes))]
    own = trained_centers(config, targets, len(centers))
    memory = _memory(config, model, centers, own, dtype, world_size)
    return DryRun(
        images=len(records),
        classes=records.num_classes,
        ranks=world_size,
        precision=str(dtype).removeprefix("torch."),
        parameters={
            "backbone": sum(parameter.numel() for parameter in model.parameters()),
            "head": weight.numel(),
            "trainable": sum(parameter.numel() for parameter in (*_trainable(model), weight)),
        },
        flops_per_image=flops,
        flops_per_step=train.batch_size * (3 * flops + 2 * dim * (len(weight) + 2 * trained)),
        memory=memory,
        memory_total=sum(memory.values()),
        shared_memory=needed(
            min(config.data.workers, usable_cores()),
            PREFETCH,
            batch_bytes(train.batch_size // world_size, targets, config.kd.signal),
        ),
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
    layout = torch.channels_last if last else torch.contiguous_format
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def saved_bytes(count: int) -> int:
        saved: dict[int, torch.UntypedStorage] = {}

        def save(tensor: Tensor) -> Tensor:
            # The storage is kept too: the address of a freed one is soon used again.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
            return tensor

        images = torch.zeros(count, 3, FACE_SIZE, FACE_SIZE).contiguous(memory_format=layout)
        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            model(images)
        return sum(storage.nbytes() for storage in saved.values())

    return _extrapolate(saved_bytes, PROBES, batch)


def _extrapolate(measure: Callable[[int], int], probes: tuple[int, int], size: int) -> int:
    """What ``measure`` would return for ``size``, if it is linear between two ``probes``."""
    few, more = map(measure, probes)
    return round(few + (more - few) / (probes[1] - probes[0]) * (size - probes[0]))


def trained_centers(config: RunConfig, targets: JoinedTargets | None, num_classes: int) -> int:
    """Centres that a step trains: all, or the largest possible sample.

    It is largest if no two images of a batch, and no two draws of an image, share a class.
    """
    wanted = images = config.train.batch_size
    if targets is not None:
        assert isinstance(targets.store, ShardStore)
        manifest = targets.store.cache.manifest
        assert manifest is not None
        signal, draws = chosen_signal(config.kd.signal, targets.spec), targets.spec.draws
        if signal != "draws":
            groups = manifest.num_samples * len(manifest.entries)
            wanted += images * sum(manifest.entries.values()) // groups
        if signal != "group" and draws is not None:
            wanted += images * draws.count
    wanted = min(wanted, num_classes)
    return wanted + math.ceil(config.head.sample_rate * (num_classes - wanted))


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
    sample = nn.Parameter(centers[:trained].detach())
    if trained < len(weight):
        extra["sampled_centers"] = sample.nbytes + optimizer_bytes(config, [sample])
    return {
        **extra,
        "backbone_weights": _bytes([*model.parameters(), *model.buffers()]),
        "class_centers": weight.nbytes,
        "gradients": _bytes([*backbone, sample]),
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
    spec = HeadSpec(margin=config.head.margins, scale=config.head.scale)
    labels = torch.zeros(batch, dtype=torch.int64)

    def peak_bytes(classes: int) -> int:
        weight = ClassCenters(classes, config.student.embedding_dim).weight
        embeddings = torch.ones(batch, config.student.embedding_dim, requires_grad=True)
        peak = PeakBytes()
        with peak:
            grouped_margin_loss(embeddings, weight, labels, None, spec).total.backward()
        return peak.highest - weight.nbytes

    return _extrapolate(peak_bytes, PROBE_CLASSES, num_classes)


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
    return sum(storage.nbytes() for storage in _storages(list(optimizer.state.values())))


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
