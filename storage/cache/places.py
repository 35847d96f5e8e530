"""Where a run may write what it makes."""

from pathlib import Path

from gkd.storage.cache import layout
from gkd.storage.cache.metadata import read_spec
from gkd.storage.errors import ConfigError, CorruptShardError


def require_outside_caches(path: Path, *, may_be_one: bool = False) -> None:
    """Refuse a place inside a cache: what is written there is no part of it and spoils it.

    With ``may_be_one`` the place itself may be one, which is then gone on with.

    Raises:
        ConfigError: naming the cache.
    """
    place = path.absolute().resolve()
    for folder in place.parents if may_be_one else (place, *place.parents):
        if _is_cache(folder):
            raise ConfigError(
                f"{path}: inside the cache {folder}, which would not be whole any more; name a "
                "place outside of it"
            )


def _is_cache(folder: Path) -> bool:
    if not (folder / layout.METADATA).is_file():
        return False
    try:
        read_spec(folder)
    except CorruptShardError:
        return True  # damaged, and not to be made worse
    except ConfigError:
        return False  # another Zarr store
    return True
