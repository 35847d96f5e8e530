"""The process's rank as torchrun sets it, and the cores and GPU that it may use.

Nothing here is read on import. A variable that is empty is one that is not set. Without a
``WORLD_SIZE`` above 1 a process works alone, and what else a cluster or a template left in the
environment has no meaning.
"""

import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gkd.storage.errors import ConfigError
from gkd.storage.util.text import printable

# Set by launchers that start many processes, which do not know of each other: rank, count.
_OTHERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}


def world_size() -> int:
    """How many processes torchrun started on all nodes; 1 without it.

    Raises:
        ConfigError: if WORLD_SIZE is not such a number; likewise below, naming the variable.
    """
    return _number("WORLD_SIZE", 1, 10**6) or 1


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    count = world_size()
    return 0 if count == 1 else _needed("RANK", 0, count - 1)


def local_world_size() -> int:
    """How many processes torchrun started on this node; 1 without it."""
    count = world_size()
    return 1 if count == 1 else _number("LOCAL_WORLD_SIZE", 1, count) or 1


def local_rank() -> int | None:
    """This process's number among those of its node; None without torchrun."""
    count = world_size()
    here = _number("LOCAL_WORLD_SIZE", 1, count) if count > 1 else None
    return None if count == 1 else _number("LOCAL_RANK", 0, (here or count) - 1)


def meeting_point() -> tuple[str, int]:
    """Address and port at which the ranks meet."""
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise _refused("MASTER_ADDR", "the address of rank 0")
    return address, _needed("MASTER_PORT", 1, 65535)


def _needed(name: str, least: int, most: int) -> int:
    number = _number(name, least, most)
    if number is None:
        raise _refused(name, f"a whole number from {least} to {most:,}")
    return number


def _number(name: str, least: int, most: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise _refused(name, f"a whole number from {least} to {most:,}")
    return int(text)


def _refused(name: str, expected: str) -> ConfigError:
    beside = "" if name == "WORLD_SIZE" else f" beside WORLD_SIZE={os.environ['WORLD_SIZE']}"
    return ConfigError(
        f"the environment variable {name}{beside}",
        expected=expected,
        got=f"{os.environ.get(name, '')!r:.60}",
        remedy="start all ranks with torchrun, or unset WORLD_SIZE for a process that works alone",
    )


def note_other_launcher() -> None:
    """Say on stderr that this is one of many processes that all do the same work."""
    for launcher, (number, count) in _OTHERS.items():
        if os.environ.get(number, "").strip() not in ("", "0"):
            print(
                f"{number}={os.environ[number]} of {count}={os.environ.get(count, '')}: each "
                f"process that {launcher} starts works alone; for ranks that share the work, "
                f"start torchrun once per node",
                file=sys.stderr,
                flush=True,
            )


def own_gpu(gpus: int) -> int:
    """Number of this process's GPU among the ``gpus``, one or more, that are visible to it.

    A process that sees one GPU takes it: its launcher may have shown each its own.

    Raises:
        ConfigError: if there are more processes than GPUs.
    """
    number = local_rank() or 0
    if 1 < gpus <= number:
        raise ConfigError(
            f"rank {number} of this node (LOCAL_RANK) has no GPU of its own",
            expected=f"at most {gpus} ranks for the {gpus} GPUs of this node",
            got=f"{max(number + 1, local_world_size())}",
            remedy=f"start them with torchrun --nproc-per-node {gpus}, or show more GPUs with "
            "CUDA_VISIBLE_DEVICES",
        )
    return 0 if gpus == 1 else number


def all_cores() -> int:
    """Cores that this process may use, for work that one process does for its whole node.

    Those that it may run on, or fewer if a container's quota of processor time is less.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return math.ceil(min(cores, cpu_quota(Path("/"))))


def cpu_quota(root: Path) -> float:
    """Processors' worth of time that the control groups of this process allow; may be infinite.

    ``root`` holds ``proc`` and ``sys``. Groups are those of Linux, version 2 (``cpu.max``) and 1
    (``cpu.cfs_quota_us``). In a container the path of its group may be that of the host, and what
    stands at the top is its own, so every folder from there up is asked.
    """
    quota = math.inf
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            path = PurePosixPath(group.lstrip("/"))
            for folder in (path, *path.parents):
                with suppress(OSError, ValueError, ZeroDivisionError):
                    quota = min(quota, _quota_of(mount / folder, version=1 if controllers else 2))
    return quota


def _quota_of(folder: Path, *, version: int) -> float:
    """The quota of one group; ValueError or OSError if it has none."""
    if version == 2:
        time, period = (folder / "cpu.max").read_text().split()
    else:
        time = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    allowed = float(time) / float(period)
    return allowed if allowed > 0 else math.inf


def usable_cores() -> int:
    """This process's share of the cores among the processes of its node."""
    return max(1, all_cores() // local_world_size())


def log_rank0(text: str) -> None:
    """Print a line on stderr, on rank 0 only; names in it need not be trusted."""
    if rank() == 0:
        print(printable(text), file=sys.stderr, flush=True)
