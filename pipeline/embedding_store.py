"""A folder that keeps a teacher's embeddings until what is made of them is finished."""

import io
import shutil
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.cache_spec import dataset_spec, teacher_spec
from gkd.pipeline.embed import EmbeddedBatch, join_batches
from gkd.pipeline.resume_check import Seen, require_same_images
from gkd.pipeline.shard_writer import AsyncShardWriter
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import DatasetSpec, Preprocess, TeacherSpec, View
from gkd.storage.errors import ConfigError, CorruptRecordError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.util.files import disk_errors, write_file
from gkd.storage.util.progress import Advance

SETTINGS = "settings.json"
SAMPLED_SHARDS, SAMPLED_IMAGES = 4, 512


def work_path(out: Path) -> Path:
    """Where embeddings are kept until ``out`` is finished."""
    return out.with_name(f"{out.name}.work")


class EmbeddingSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides kept embeddings."""

    teacher: TeacherSpec
    preprocess: Preprocess
    precision: str
    dataset: DatasetSpec
    shard_samples: int


class EmbeddingStore:
    """Embeddings of records, ``shard_samples`` to a file of ``folder``, each whole or absent.

    Raises:
        ConfigError: where the folder cannot be written, or holds something else.
        SpecMismatchError: where it holds embeddings of another teacher or data set.
        CorruptRecordError: where an image of theirs cannot be read any more.
    """

    def __init__(
        self,
        folder: Path,
        records: Records,
        embedder: Embedder,
        shard_samples: int,
        *,
        skip_corrupt: bool,
    ) -> None:
        self.folder, self.shard_samples, self.skip_corrupt = folder, shard_samples, skip_corrupt
        self.num_samples = len(records)
        self.num_shards = -(-self.num_samples // shard_samples)
        source = EmbeddingSource(
            teacher_spec(embedder),
            embedder.preprocess,
            embedder.precision,
            dataset_spec(records),
            shard_samples,
        )
        settings = folder / SETTINGS
        if not settings.exists():
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_file(settings, msgspec.json.format(msgspec.json.encode(source)))
        _require_same(settings, source)
        require_same_images(records, folder, self.shards(), self._seen)

    def rows(self, shard: int) -> range:
        """Rows of the records that a shard holds."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.num_samples))

    def has(self, shard: int) -> bool:
        """Whether the shard's embeddings are kept."""
        return self._path(shard).exists()

    def shards(self) -> list[int]:
        """The shards that are kept, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def sample(self, view: View) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows [n] of the records and their embeddings [n, D]: a random few of a few shards."""
        kept, rng = self.shards(), np.random.default_rng(0)
        places = np.linspace(0, len(kept) - 1, min(len(kept), SAMPLED_SHARDS)).astype(int)
        rows, embeddings = [], []
        for place in places.tolist():
            batch = self.load(kept[place], [view])
            count = min(SAMPLED_IMAGES // len(places), len(batch.kept))
            some = np.sort(rng.choice(len(batch.kept), count, replace=False))
            rows.append(batch.rows.start + batch.kept[some])
            embeddings.append(batch.embeddings[view][some])
        return np.concatenate(rows), np.concatenate(embeddings)

    def _seen(self, shard: int) -> Seen:
        """The rows of a kept shard that have an image, and its digests."""
        batch = self.load(shard, [])
        return batch.rows.start + batch.kept, batch.digests[batch.kept]

    def keep(self, batches: Iterable[EmbeddedBatch], advance: Advance) -> None:
        """Keep the batches of whole shards, in their order; each is written while others come."""
        parts: list[EmbeddedBatch] = []
        with AsyncShardWriter() as background:
            for batch in batches:
                background.check()
                parts.append(batch)
                advance(len(batch.rows))
                shard = batch.rows.start // self.shard_samples
                if batch.rows.stop == self.rows(shard).stop:
                    background.start(partial(self._save, shard, parts))
                    parts = []

    def _save(self, shard: int, parts: Sequence[EmbeddedBatch]) -> None:
        batch = join_batches(parts)
        buffer = io.BytesIO()
        arrays = {f"embeddings_{view}": e for view, e in batch.embeddings.items()}
        skipped = np.frombuffer(msgspec.json.encode(dict(batch.skipped)), np.uint8)
        np.savez(
            buffer,
            allow_pickle=False,
            rows=np.array([batch.rows.start, batch.rows.stop]),
            kept=batch.kept,
            digests=batch.digests,
            skipped=skipped,
            **arrays,
        )
        with disk_errors(self.folder):
            write_file(self._path(shard), buffer.getvalue())

    def load(self, shard: int, views: Sequence[View]) -> EmbeddedBatch:
        """The kept embeddings of a shard.

        Raises:
            CorruptRecordError: where an earlier run left records out and this one shall not.
        """
        with np.load(self._path(shard), allow_pickle=False) as arrays:
            start, stop = arrays["rows"].tolist()
            batch = EmbeddedBatch(
                rows=range(start, stop),
                kept=arrays["kept"],
                embeddings={view: arrays[f"embeddings_{view}"] for view in views},
                digests=arrays["digests"],
                skipped=msgspec.json.decode(arrays["skipped"].tobytes(), type=dict[int, str]),
            )
        if batch.skipped and not self.skip_corrupt:
            place, reason = next(iter(batch.skipped.items()))
            raise CorruptRecordError(
                f"{self._path(shard)}: row {start + place} of the records: {reason}; an earlier "
                "run left it out by --skip-corrupt: give that again to go on"
            )
        return batch

    def remove(self) -> None:
        """Delete the folder."""
        # Renamed first: what an interruption leaves is no folder of embeddings without settings.
        aside = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
        self.folder.rename(aside)
        shutil.rmtree(aside)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npz"


def _require_same(path: Path, source: EmbeddingSource) -> None:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=EmbeddingSource)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: expected the settings of kept embeddings, got {error}; delete "
            f"{path.parent} to start again"
        ) from error
    differing = [
        f"  {name}: kept {getattr(kept, name)}, this run {getattr(source, name)}"
        for name in EmbeddingSource.__struct_fields__
        if getattr(kept, name) != getattr(source, name)
    ]
    if differing:
        raise SpecMismatchError(
            f"{path.parent} keeps embeddings of another run:\n"
            + "\n".join(differing)
            + f"\nRun again as before to go on, or delete {path.parent} to start again."
        )
