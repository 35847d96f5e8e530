"""Targets as memory-mapped files for training, made once per node and shared by all processes."""

import contextlib
import fcntl
import os
import re
import shutil
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import require_outside_caches
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS, CacheSpec, View
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.errors import ConfigError, CorruptDataError
from gkd.storage.reading.flat_arrays import OFFSETS, Shape, array_shapes, read_shards
from gkd.storage.util.files import (
    UNSUPPORTED,
    disk_errors,
    publish_dir,
    remove_dir,
    require_room,
)
from gkd.storage.util.input_files import read_small, require_local
from gkd.storage.util.lock import file_lock, try_lock
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import all_cores, log_rank0

_OTHER_FOLDER = "set GKD_CACHE_DIR to a folder that you may write to"
DESCRIPTION = "store.json"
DIGESTS = "digests"
EMBEDDINGS = "embeddings"
LOCK = "lock"
_BLOCK = 1 << 24
_MAX_WORKERS = 8
_COUNTED = 1 << 20
_STORE = re.compile("|".join(re.escape(name) for name in (*VIEWS, "+".join(VIEWS))))
_TEMPORARY = re.compile(rf"\.({_STORE.pattern})\.[0-9a-f]{{32}}")


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cache_id: str
    views: tuple[View, ...]
    spec: CacheSpec
    files: dict[str, int]  # bytes by name
    checksums: dict[str, int]  # CRC-32 by name


class TargetStore:
    """Targets of all samples in memory-mapped files; made by ``materialise``.

    The rows of the views follow each other: sample i of the v-th view is row ``v * N + i``. It
    pickles as its path, and a fork shares the maps. ``collect`` does not remove an open store.

    Raises:
        CorruptDataError: on opening, if a file is missing or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A shared lock, which filelock does not have, marks the store as in use.
            descriptor = os.open(path / DESCRIPTION, os.O_RDONLY | os.O_NONBLOCK)
            weakref.finalize(self, os.close, descriptor)
            try_lock(descriptor, fcntl.LOCK_SH)
            description = msgspec.json.decode(
                read_small(path / DESCRIPTION, follow_links=False), type=_Description
            )
            sizes = {name: (path / name).stat().st_size for name in description.files}
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from error
        if sizes != description.files:
            raise _damaged(path, f"expected {description.files} bytes, got {sizes}")
        self.spec = description.spec
        self.cache_id = description.cache_id
        self.views = description.views
        self.checksums = description.checksums
        names = (name for name in layout.arrays(self.spec, self.views[0]) if name != "sizes")
        self._targets = SparseTargets.from_arrays(
            self._map(OFFSETS), {name: self._map(name) for name in names}
        )
        n = self.spec.num_samples
        # First row of the original and of the flipped view.
        self._first_rows = np.array(
            [self.views.index(view) * n if view in self.views else -1 for view in VIEWS]
        )

    def __reduce__(self) -> tuple[type["TargetStore"], tuple[Path]]:
        return TargetStore, (self.path,)

    def __len__(self) -> int:
        return self.spec.num_samples

    def lookup(self, rows: npt.NDArray[np.int64], flipped: npt.NDArray[np.bool_]) -> SparseTargets:
        """Targets of samples ``rows`` [B], of the flipped view if ``flipped`` [B], else original.

        A sample that the cache skipped has an empty group.

        Raises:
            IndexError: if a row is not one of the cache's samples.
            ConfigError: if a view was not materialised.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a cache of {len(self)} samples")
        first = self._first_rows[np.asarray(flipped, np.intp)]
        if len(first) and first.min() < 0:
            raise ConfigError(
                f"targets of the {' and '.join(self.views)} view only",
                path=self.path,
                remedy="train without random flips, or cache again with --views original,flipped",
            )
        return self._targets.take(first + rows)

    def size_counts(self, view: View) -> npt.NDArray[np.int64]:
        """Number of samples of a view with each group size, int64 [max_group + 1]."""
        first = self.views.index(view) * len(self)
        counts = np.zeros(self.spec.max_group + 1, np.int64)
        for begin in range(first, first + len(self), _COUNTED):
            end = min(begin + _COUNTED, first + len(self))
            sizes = np.diff(self._targets.offsets[begin : end + 1])
            counts += np.bincount(sizes, minlength=len(counts))
        return counts

    def shapes(self) -> dict[str, Shape]:
        """Type and shape of each array."""
        arrays = {OFFSETS: self._targets.offsets} | self._targets.arrays()
        return {name: (array.dtype, array.shape) for name, array in arrays.items()}

    def check(self) -> None:
        """Read all files once, and hold them against their checksums and the cache's bounds.

        This also brings the files into memory: random reads of cold files take minutes.

        Raises:
            CorruptDataError: if something differs from what was made, or names no class.
        """
        for name in self.shapes():
            if _checksum(self.path / f"{name}.npy") != self.checksums.get(f"{name}.npy"):
                raise _damaged(self.path, f"{name}.npy is not what was written")
        offsets, indices = self._targets.offsets, self._targets.indices
        if offsets[0] != 0 or offsets[-1] != len(indices):
            raise _damaged(self.path, "its samples do not cover its entries")
        for begin in range(0, len(offsets), _COUNTED):
            sizes = np.diff(offsets[begin : begin + _COUNTED + 1])
            if len(sizes) and (sizes.min() < 0 or sizes.max() > self.spec.max_group):
                raise _damaged(self.path, f"a group beyond {self.spec.max_group} classes")
        for begin in range(0, len(indices), _COUNTED):
            if (largest := indices[begin : begin + _COUNTED].max()) >= self.spec.num_classes:
                raise _damaged(self.path, f"class {largest} of {self.spec.num_classes}")

    def _map(self, name: str) -> npt.NDArray[Any]:
        try:
            array = np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError, OverflowError) as error:
            raise _damaged(self.path, error) from error
        # A plain array on the map: slicing np.memmap itself is slow.
        return np.asarray(array)


def _damaged(path: Path, problem: object) -> CorruptDataError:
    return CorruptDataError(
        f"damaged ({problem})", path=path, remedy="remove it, it is made again as needed"
    )


def materialise(
    cache: Cache, *, folder: Path | None = None, views: Sequence[View] | None = None
) -> TargetStore:
    """The cache's targets as memory-mapped files, made now or found from before.

    They are in ``<folder>/<cache id>/<views>``; ``folder`` is by default ``$GKD_CACHE_DIR`` or
    ``~/.cache/gkd``. The cache's files are verified against their hashes while they are copied.
    One process copies while others wait. A store with a missing or truncated file is made again.

    Raises:
        ConfigError: if the disk has no room or is read-only, or a view is not in the cache.
        CorruptShardError: if the cache is damaged.
        IncompleteCacheError: if the cache is not finished.
    """
    chosen: tuple[View, ...] = tuple(view for view in VIEWS if view in (views or cache.spec.views))
    if not set(chosen) <= set(cache.spec.views):
        raise ConfigError(
            path=cache.path,
            expected=f"views {', '.join(chosen)}",
            got=f"a cache of {', '.join(cache.spec.views)}",
            remedy=f"cache again with --views {','.join(chosen)}",
        )
    home = (folder or default_folder()).absolute() / cache.id
    target = home / "+".join(chosen)
    with disk_errors(home, _OTHER_FOLDER):
        # One that another user made can be read where nothing can be written.
        if (found := _open(cache, chosen, target)) is None:
            home.mkdir(parents=True, exist_ok=True)
            with file_lock(home / LOCK):
                if (found := _open(cache, chosen, target)) is None:
                    for leftover in filter(is_temporary, list(home.iterdir())):
                        shutil.rmtree(leftover)
                    remove_store(target)
                    _build(cache, chosen, target)
                    return TargetStore(target)
    touch(target / DESCRIPTION)
    return found


def _open(cache: Cache, views: tuple[View, ...], target: Path) -> TargetStore | None:
    """The store at ``target``; None if there is none, or a damaged or another one."""
    if not os.path.lexists(target):
        return None
    try:
        store = TargetStore(target)
        shapes = array_shapes(cache, range(cache.spec.num_shards), views)
        if (store.cache_id, store.views, store.shapes()) != (cache.id, views, shapes):
            raise _damaged(target, "of another cache, or made by another version")
        store.check()
    except (CorruptDataError, NotADirectoryError) as error:
        log_rank0(f"{target}: these targets are not used and are made again: {error}")
        return None
    return store


def default_folder() -> Path:
    """``$GKD_CACHE_DIR``, or ``~/.cache/gkd``; raises ConfigError if that is inside a cache."""
    chosen = os.environ.get("GKD_CACHE_DIR", "")
    require_local(chosen)
    try:
        folder = Path(chosen) if chosen else Path.home() / ".cache" / "gkd"
    except RuntimeError as error:
        raise ConfigError(f"this user has no home folder; {_OTHER_FOLDER}") from error
    require_outside_caches(folder)
    return folder


def touch(path: Path) -> None:
    """Record that ``path`` was used now, if its owner and its disk permit."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _build(cache: Cache, views: tuple[View, ...], target: Path) -> None:
    shards = range(cache.spec.num_shards)
    shapes = array_shapes(cache, shards, views)
    require_room(
        target.parent,
        sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values()),
        "set GKD_CACHE_DIR to a larger disk, or read the targets block by block with "
        "data.order=blocks",
    )
    with publish_dir(target) as folder:
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            for name, (dtype, shape) in shapes.items()
        }
        for name in arrays:
            _allocate(folder / f"{name}.npy")
        workers = min(_MAX_WORKERS, all_cores())
        with progress("materialise", len(shards) * len(views), "shards") as advance:
            for _ in read_shards(cache, shards, views, arrays, workers=workers):
                advance()
        for array in arrays.values():
            array.flush()
        del arrays
        files = list(folder.glob("*.npy"))
        sizes = {path.name: path.stat().st_size for path in files}
        checksums = {path.name: _checksum(path) for path in files}
        description = _Description(cache.id, views, cache.spec, sizes, checksums)
        (folder / DESCRIPTION).write_bytes(layout.encode_json(description))


def _allocate(path: Path) -> None:
    """Take the disk's room for a sparse file: a map of one dies by SIGBUS where there is none."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                error.filename = str(path)
                raise


def _checksum(path: Path) -> int:
    """CRC-32 of a file: a guard against rot, at the speed of the disk."""
    checksum, buffer = 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
    return checksum


def is_store(path: Path) -> bool:
    """Whether ``path`` has the name and the shape of a store."""
    return bool(_STORE.fullmatch(path.name)) and is_folder(path) and (path / DESCRIPTION).is_file()


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is a store that is being made or removed."""
    return bool(_TEMPORARY.fullmatch(path.name)) and is_folder(path)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def remove_store(path: Path) -> None:
    """Delete a store, a part of one or a file; without effect if there is nothing."""
    if is_temporary(path):
        shutil.rmtree(path)
    elif path.is_dir():
        remove_dir(path)
    else:
        path.unlink(missing_ok=True)
