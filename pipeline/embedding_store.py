"""A folder that keeps a teacher's embeddings until what is made of them is finished."""

import io
import shlex
import zipfile
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.cache_spec import dataset_spec, recorded_batch_size, teacher_spec
from gkd.pipeline.embed import (
    EmbeddedBatch,
    default_batch_size,
    embed_shards,
    join_batches,
    split_batch,
    whole_shards,
)
from gkd.pipeline.resume_check import ImageDigests, require_same_images
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.spec import (
    VIEWS,
    DatasetSpec,
    Preprocess,
    Sharding,
    TeacherSpec,
    View,
    resume_hints,
)
from gkd.storage.errors import (
    ConfigError,
    CorruptDataError,
    CorruptRecordError,
    SpecMismatchError,
)
from gkd.storage.records.base import Records
from gkd.storage.util.files import disk_errors, remove_dir, require_room, write_file
from gkd.storage.util.input_files import open_regular, read_small
from gkd.storage.util.parallel import write_behind
from gkd.storage.util.progress import Advance
from gkd.storage.util.text import describe_differences

SETTINGS = "settings.json"
SAMPLED_SHARDS, SAMPLED_IMAGES = 4, 512


def work_path(out: Path) -> Path:
    """Where embeddings are kept until ``out`` is finished."""
    return out.with_name(f"{out.name}.work")


class EmbeddingSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that determines the kept embeddings."""

    teacher: TeacherSpec
    preprocess: Preprocess
    precision: str
    dataset: DatasetSpec
    shard_samples: int
    pixels: Literal["opencv"] | None = None
    batch_size: int | msgspec.UnsetType = msgspec.UNSET


class EmbeddingStore:
    """Embeddings of all views of records, one file of ``folder`` per shard, complete or absent.

    Raises:
        ConfigError: if the folder cannot be written or holds something else.
        SpecMismatchError: if it holds embeddings of another teacher or data set.
        CorruptRecordError: if an image of theirs cannot be read any more.
    """

    def __init__(
        self,
        folder: Path,
        records: Records,
        embedder: Embedder,
        shard_samples: int,
        *,
        batch_size: int | None,
        skip_corrupt: bool,
    ) -> None:
        self.folder, self.records, self.embedder = folder, records, embedder
        self.sharding, self.skip_corrupt = Sharding(len(records), shard_samples), skip_corrupt
        self.batch_size = batch_size or default_batch_size(embedder)
        source = EmbeddingSource(
            teacher_spec(embedder),
            embedder.preprocess,
            embedder.precision,
            dataset_spec(records),
            shard_samples,
            pixels="opencv",
            batch_size=recorded_batch_size(embedder, batch_size),
        )
        settings = folder / SETTINGS
        if not settings.exists():
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_file(settings, msgspec.json.format(msgspec.json.encode(source)))
        _require_same(settings, source)
        require_same_images(records, folder, self.shards(), self._image_digests)

    def has(self, shard: int) -> bool:
        """Whether the shard's embeddings are kept."""
        return self._path(shard).exists()

    def shards(self) -> list[int]:
        """The shards that are kept, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def missing(self) -> list[int]:
        """The shards that are not kept, ascending."""
        return [shard for shard in range(self.sharding.num_shards) if not self.has(shard)]

    def require_room(self) -> None:
        """Check that the disk has room for the shards that are missing.

        Raises:
            ConfigError: if it has not.
        """
        rows = self.sharding.count_rows(self.missing())
        require_room(self.folder, rows * len(VIEWS) * self.embedder.embedding_dim * 4)

    def fill(self, shards: Sequence[int], advance: Advance, *, workers: int) -> int:
        """Run the teacher over ``shards`` and keep its embeddings; the images that it has seen.

        Raises:
            CorruptRecordError: at an unreadable record, unless ``skip_corrupt``.
            GkdError: if the teacher's output has no direction.
        """
        images = 0

        def save(parts: Sequence[EmbeddedBatch]) -> None:
            nonlocal images
            self._save(join_batches(parts))
            images += sum(len(part.kept) for part in parts)

        embedded = embed_shards(
            self.records,
            shards,
            self.sharding,
            self.embedder,
            VIEWS,
            batch_size=self.batch_size,
            workers=workers,
            skip_corrupt=self.skip_corrupt,
        )
        with closing(embedded):
            write_behind(save, whole_shards(embedded, self.sharding, advance))
        return images

    def sample(self, view: View) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows [n] of the records and their embeddings [n, D]: a random few of a few shards."""
        kept, rng = self.shards(), np.random.default_rng(0)
        chosen = np.linspace(0, len(kept) - 1, min(len(kept), SAMPLED_SHARDS)).astype(int)
        rows, embeddings = [], []
        for index in chosen.tolist():
            batch = self.load(kept[index], [view])
            count = min(SAMPLED_IMAGES // len(chosen), len(batch.kept))
            sampled = np.sort(rng.choice(len(batch.kept), count, replace=False))
            rows.append(batch.rows.start + batch.kept[sampled])
            embeddings.append(batch.embeddings[view][sampled])
        return np.concatenate(rows), np.concatenate(embeddings)

    def load(self, shard: int, views: Sequence[View]) -> EmbeddedBatch:
        """The kept embeddings of a shard.

        Raises:
            CorruptDataError: if the file is damaged: it has a CRC of each array.
            CorruptRecordError: if an earlier run left records out and this one must not.
        """
        path = self._path(shard)
        try:
            with open_regular(path, follow_links=False) as file, np.load(file) as arrays:
                start, stop = arrays["rows"].tolist()
                batch = EmbeddedBatch(
                    rows=range(start, stop),
                    kept=arrays["kept"],
                    embeddings={view: arrays[f"embeddings_{view}"] for view in views},
                    digests=arrays["digests"],
                    skipped=msgspec.json.decode(arrays["skipped"].tobytes(), type=dict[int, str]),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CorruptDataError(
                f"damaged embeddings of an earlier run ({error})",
                path=path,
                remedy="delete this file and run the same command again: its images are embedded "
                "again",
            ) from error
        if batch.skipped and not self.skip_corrupt:
            position, reason = next(iter(batch.skipped.items()))
            raise CorruptRecordError(
                f"{self._path(shard)}: row {start + position} of the records: {reason}; an earlier "
                "run left it out with --skip-corrupt: give that option again to resume"
            )
        return batch

    def batches(
        self, shards: Iterable[int], views: Sequence[View]
    ) -> Generator[EmbeddedBatch, None, None]:
        """The kept embeddings of shards, in the batches that the teacher would give them in."""
        for shard in shards:
            yield from split_batch(self.load(shard, views), self.batch_size)

    def remove(self) -> None:
        """Delete the folder."""
        remove_dir(self.folder)

    def _image_digests(self, shard: int) -> ImageDigests:
        batch = self.load(shard, [])
        return batch.rows.start + batch.kept, batch.digests[batch.kept]

    def _save(self, batch: EmbeddedBatch) -> None:
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
            path = self._path(self.sharding.shard_of(batch.rows.start))
            write_file(path, buffer.getvalue())

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npz"


def _require_same(path: Path, source: EmbeddingSource) -> None:
    try:
        kept = msgspec.json.decode(read_small(path, follow_links=False), type=EmbeddingSource)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: expected the settings of kept embeddings, got {error}; start again "
            f"after rm -r {shlex.quote(str(path.parent))}"
        ) from error
    differences = describe_differences(kept, source, old_name="kept", new_name="this run")
    if differences:
        raise SpecMismatchError(
            f"{path.parent} keeps embeddings of another run:\n  "
            + "\n  ".join(differences)
            + resume_hints(differences)
            + "\nGive the settings of that run to resume it, or start again after "
            f"rm -r {shlex.quote(str(path.parent))}"
        )
