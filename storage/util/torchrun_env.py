"""The process's rank as torchrun sets it, and the cores and GPU that it may use."""

import os
import sys


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started on all nodes; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes torchrun started on this node; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """This process's number among those of its node; None without torchrun."""
    number = os.environ.get("LOCAL_RANK")
    return None if number is None else int(number)


def own_gpu(gpus: int) -> int:
    """Number of this process's GPU among the ``gpus``, one or more, that are visible to it.

    If there are more processes than GPUs, they share them.
    """
    return (local_rank() or 0) % gpus


def all_cores() -> int:
    """Cores that this process may run on, for work that one process does for its whole node."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def usable_cores() -> int:
    """This process's share of the cores among the processes of its node."""
    return max(1, all_cores() // local_world_size())


def log_rank0(text: str) -> None:
    """Print a line on stderr, on rank 0 only."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)
