"""What a run's cache says of itself, from the run's parts."""

from importlib.metadata import version

import msgspec

from gkd.pipeline.embed import default_batch_size
from gkd.pipeline.settings import PartitionSettings
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import CacheSpec, CentersSpec, DatasetSpec, TeacherSpec, View
from gkd.storage.records.base import Records


def teacher_spec(embedder: Embedder) -> TeacherSpec:
    """The teacher by name, network and digest."""
    return TeacherSpec(
        embedder.name,
        embedder.arch,
        embedder.sha256,
        embedder.embedding_dim,
        compiled=embedder.compiled,
    )


def recorded_batch_size(embedder: Embedder, batch_size: int | None) -> int | msgspec.UnsetType:
    """The batch size if it decides the last bits of embeddings: not on a CPU."""
    on_cpu = embedder.device == "cpu"
    return msgspec.UNSET if on_cpu else batch_size or default_batch_size(embedder)


def dataset_spec(records: Records) -> DatasetSpec:
    """The records by name, counts and fingerprint."""
    return DatasetSpec(
        records.name,
        len(records),
        records.num_classes,
        records.label_order,
        records.fingerprint,
    )


def cache_spec(
    dataset: DatasetSpec,
    embedder: Embedder,
    centers: CentersSpec,
    settings: PartitionSettings,
    *,
    views: tuple[View, ...],
    shard_samples: int,
    batch_size: int | None,
) -> CacheSpec:
    """The spec of a cache of all images of a data set."""
    packages = ["gkd", "torch", "numpy", "zarr"]
    packages += ["onnxruntime"] if embedder.arch.partition(":")[0] == "onnx" else []
    return CacheSpec(
        num_samples=dataset.num_images,
        num_classes=dataset.num_classes,
        shard_samples=shard_samples,
        max_group=settings.max_group,
        threshold=settings.threshold,
        group_temperature=settings.group_temperature,
        temperatures=settings.temperatures,
        scale=settings.scale,
        margin=settings.margin,
        views=views,
        preprocess=embedder.preprocess,
        pixels="opencv",
        precision=embedder.precision,
        batch_size=recorded_batch_size(embedder, batch_size),
        teacher=teacher_spec(embedder),
        centers=centers,
        dataset=dataset,
        draws=settings.draws,
        software={package: version(package) for package in packages},
    )
