"""Targets as memory-mapped files for training: made once per node, shared by all its processes."""

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
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
from gkd.storage.util.files import disk_errors, require_room, sync_folder, write_file
from gkd.storage.util.progress import progress
from gkd.storage.util.torchrun_env import all_cores

DESCRIPTION = "store.json"
DIGESTS = "digests"
EMBEDDINGS = "embeddings"
LOCK = "lock"
DAY = 86_400
_WARM_BLOCK = 1 << 24
_MAX_WORKERS = 8
_COUNTED = 1 << 20
# The folder may be shared with strangers, so only what bears exactly these names is ours.
_HOME = re.compile(r"[0-9a-f]{64}")
_STORE = re.compile("|".join(re.escape(name) for name in (*VIEWS, "+".join(VIEWS))))
_ASIDE = re.compile(rf"\.({_STORE.pattern})\.[0-9a-f]{{32}}")
_EMBEDDINGS_FILE = re.compile(
    r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{32}"
)
_DIGESTS_FILE = re.compile(r"[0-9a-f]{64}\.(npz|lock)|\.[0-9a-f]{64}\.npz\.[0-9a-f]{32}")


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cache_id: str
    views: tuple[View, ...]
    spec: CacheSpec
    files: dict[str, int]  # bytes by name


class TargetStore:
    """Targets of all samples in memory-mapped files; made by ``materialise``.

    The rows of the views follow each other: sample i of the v-th view is row ``v * N + i``. Pickles
    as its path, and a fork shares the maps. While one is open, ``collect`` leaves its files alone.

    Raises:
        CorruptDataError: on opening, where a file is missing or not as long as it was made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            in_use = os.open(path / DESCRIPTION, os.O_RDONLY)
            weakref.finalize(self, os.close, in_use)
            fcntl.flock(in_use, fcntl.LOCK_SH)
            description = msgspec.json.decode((path / DESCRIPTION).read_bytes(), type=_Description)
            sizes = {name: (path / name).stat().st_size for name in description.files}
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from error
        if sizes != description.files:
            raise _damaged(path, f"expected {description.files} bytes, got {sizes}")
        self.spec = description.spec
        self.cache_id = description.cache_id
        self.views = description.views
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
        """Targets of samples ``rows`` [B], each of the view that ``flipped`` [B] says.

        A sample that the cache skipped has an empty group.

        Raises:
            IndexError: where a row is not one of the cache's samples.
            ConfigError: where a view is asked for that was not materialised.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a cache of {len(self)} samples")
        first = self._first_rows[np.asarray(flipped, np.intp)]
        if len(first) and first.min() < 0:
            raise ConfigError(
                f"{self.path}: targets of the {' and '.join(self.views)} view only; train without "
                "random flips, or cache again with --views original,flipped"
            )
        return self._targets.take(first + rows)

    def size_counts(self, view: View) -> npt.NDArray[np.int64]:
        """How many samples of a view have a group of each size, int64 [max_group + 1]."""
        first = self.views.index(view) * len(self)
        counts = np.zeros(self.spec.max_group + 1, np.int64)
        for begin in range(first, first + len(self), _COUNTED):
            end = min(begin + _COUNTED, first + len(self))
            sizes = np.diff(self._targets.offsets[begin : end + 1])
            counts += np.bincount(sizes, minlength=len(counts))
        return counts

    def _map(self, name: str) -> npt.NDArray[Any]:
        try:
            array = np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise _damaged(self.path, error) from error
        # A plain array on the map: slices of np.memmap itself are slow to make.
        return np.asarray(array)

    def shapes(self) -> dict[str, Shape]:
        """Type and shape of each array."""
        arrays = {OFFSETS: self._targets.offsets} | self._targets.arrays()
        return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def _damaged(path: Path, problem: object) -> CorruptDataError:
    return CorruptDataError(f"{path}: damaged ({problem}); remove it, it is made again as needed")


def materialise(
    cache: Cache, *, folder: Path | None = None, views: Sequence[View] | None = None
) -> TargetStore:
    """The cache's targets as memory-mapped files, made now or found from before.

    They stand in ``<folder>/<cache id>/<views>``; ``folder`` is by default ``$GKD_CACHE_DIR`` or
    ``~/.cache/gkd``. The cache's files are held against their hashes while they are copied. One
    process makes them while others wait for it. Those found with a file missing or cut are made
    again.

    Raises:
        ConfigError: where the disk has no room or is closed, or a view is not in the cache.
        CorruptShardError: where the cache is damaged.
        IncompleteCacheError: where the cache is not finished.
    """
    chosen: tuple[View, ...] = tuple(view for view in VIEWS if view in (views or cache.spec.views))
    if not set(chosen) <= set(cache.spec.views):
        raise ConfigError(
            f"{cache.path}: expected views {', '.join(chosen)}, the cache has "
            f"{', '.join(cache.spec.views)}; cache again with --views {','.join(chosen)}"
        )
    home = (folder or default_folder()).absolute() / cache.id
    target = home / "+".join(chosen)
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(home / LOCK):
            found = _open(cache, chosen, target)
            if found is None:
                # Nobody else is at work here, so what lies about was left by one that died.
                for leftover in filter(_is_aside, list(home.iterdir())):
                    shutil.rmtree(leftover)
                if os.path.lexists(target):
                    _remove(target)
                _build(cache, chosen, target)
            store = found or TargetStore(target)
    if found:
        touch(target / DESCRIPTION)
        _warm(target)
    return store


def _open(cache: Cache, views: tuple[View, ...], target: Path) -> TargetStore | None:
    """The store at ``target``; None where there is none, or none that is whole."""
    if not os.path.lexists(target):
        return None
    try:
        store = TargetStore(target)
    except (CorruptDataError, NotADirectoryError):
        return None
    shapes = array_shapes(cache, range(cache.spec.num_shards), views)
    is_its = store.cache_id == cache.id and store.views == views and store.shapes() == shapes
    return store if is_its else None


def default_folder() -> Path:
    """``$GKD_CACHE_DIR``, or ``~/.cache/gkd``; ConfigError where that is inside a cache."""
    chosen = os.environ.get("GKD_CACHE_DIR")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "gkd"
    require_outside_caches(folder)
    return folder


def touch(path: Path) -> None:
    """Note that ``path`` was used now, where it is ours to note."""
    with contextlib.suppress(PermissionError):
        os.utime(path)


def _build(cache: Cache, views: tuple[View, ...], target: Path) -> None:
    shards = range(cache.spec.num_shards)
    shapes = array_shapes(cache, shards, views)
    needed = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values())
    _require_space(target.parent, needed)
    aside = _aside(target)
    aside.mkdir()
    try:
        arrays = {
            name: np.lib.format.open_memmap(aside / f"{name}.npy", "w+", dtype, shape)
            for name, (dtype, shape) in shapes.items()
        }
        workers = min(_MAX_WORKERS, all_cores())
        with progress("materialise", len(shards) * len(views), "shards") as advance:
            for _ in read_shards(cache, shards, views, arrays, workers=workers):
                advance()
        for array in arrays.values():
            array.flush()
        del arrays
        sizes = {path.name: path.stat().st_size for path in aside.glob("*.npy")}
        description = _Description(cache.id, views, cache.spec, sizes)
        write_file(aside / DESCRIPTION, layout.encode_json(description))
        aside.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(store: Path) -> Path:
    """A new name beside a store, for one that is being made or removed."""
    return store.with_name(f".{store.name}.{uuid.uuid4().hex}")


def _is_aside(path: Path) -> bool:
    return bool(_ASIDE.fullmatch(path.name)) and _is_real_folder(path)


def _is_store(path: Path) -> bool:
    return (
        bool(_STORE.fullmatch(path.name))
        and _is_real_folder(path)
        and (path / DESCRIPTION).is_file()
    )


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _require_space(folder: Path, needed: int) -> None:
    require_room(
        folder,
        needed,
        "set GKD_CACHE_DIR to a larger disk, or read the targets block by block with "
        "data.order=blocks",
    )


def _warm(target: Path) -> None:
    """Read everything once: random reads of cold files would take minutes to do the same."""
    files = list(target.glob("*.npy"))
    size = sum(file.stat().st_size for file in files)
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return
    buffer = bytearray(_WARM_BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@dataclass(frozen=True)
class Collected:
    """What ``collect`` found: ``removed`` says whether it is gone, or would be in a dry run.

    days  since it was last used
    why   it stays, or an empty string
    """

    path: Path
    bytes: int
    days: float
    removed: bool
    why: str


def collect(
    *, folder: Path | None = None, older_than: float = 0.0, dry_run: bool = False
) -> list[Collected]:
    """Remove what gkd left in ``folder`` and nobody uses: stores, half stores, digests, embeddings.

    What was used within the last ``older_than`` days stays, and what a process has open or is
    making. Everything can be made again from its cache, its records or its model. Anything in
    ``folder`` that does not have the place and the name of such a store or file is somebody
    else's and stays.
    """
    folder = (folder or default_folder()).absolute()
    now = time.time()
    return [
        _collect_one(path, older_than, now, dry_run=dry_run)
        for path in sorted(_collectable(folder))
    ]


def _collectable(folder: Path) -> Iterator[Path]:
    for name, pattern in ((DIGESTS, _DIGESTS_FILE), (EMBEDDINGS, _EMBEDDINGS_FILE)):
        for path in (folder / name).glob("*"):
            if pattern.fullmatch(path.name) and path.is_file():
                yield path
    for home in folder.glob("*"):
        if _HOME.fullmatch(home.name) and _is_real_folder(home):
            yield from (path for path in home.iterdir() if _is_store(path) or _is_aside(path))


def _collect_one(path: Path, older_than: float, now: float, *, dry_run: bool) -> Collected:
    mark = path / DESCRIPTION if (path / DESCRIPTION).exists() else path
    days = max(0.0, now - mark.stat().st_mtime) / DAY
    files = list(path.rglob("*")) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    why = f"used within {older_than:g} days" if days < older_than else ""
    if not why:
        with _unused(path) as unused:
            why = "" if unused else "in use"
            if unused and not dry_run:
                _remove(path)
    return Collected(path, size, days, not why, why)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    if not _is_aside(path):
        # Half removed it must not look like a store any more.
        path = path.rename(_aside(path))
    shutil.rmtree(path)


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether no process makes, opens or has open what is at ``path``; none can meanwhile."""
    if not path.is_dir():
        yield True
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(path.parent / LOCK, timeout=0))
            if (path / DESCRIPTION).exists():
                file = held.enter_context((path / DESCRIPTION).open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (filelock.Timeout, BlockingIOError):
            yield False
            return
        yield True
