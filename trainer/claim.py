"""A run folder held for one training alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from gkd.storage.cache.places import require_outside_caches
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import disk_errors
from gkd.trainer.distributed import Ranks
from gkd.trainer.run_dir import RUN


@contextmanager
def claimed(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder for these ranks alone.

    Raises:
        ConfigError: where it holds something else, is inside a cache or cannot be written, or
            another process trains into it.
    """
    lock = filelock.FileLock(out / ".lock", timeout=0)
    ranks.together(lambda: _claim(out, lock) if ranks.first else None)
    try:
        yield
    finally:
        lock.release()


def _claim(out: Path, lock: filelock.BaseFileLock) -> None:
    try:
        with disk_errors(out):
            _require_place(out)
            lock.acquire()
    except filelock.Timeout as held:
        raise ConfigError(
            f"{out}: another process is training into this folder; wait for it, or name another"
        ) from held


def _require_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder to train into, got a file; name another")
    require_outside_caches(out)
    out.mkdir(parents=True, exist_ok=True)
    strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if strangers and RUN not in strangers:
        raise ConfigError(
            f"{out}: expected a new folder or one of an earlier training, got one that holds "
            f"{', '.join(sorted(strangers)[:3])}; name another folder"
        )
