"""What torch computes on and in: devices, precisions and threads.

The rest of storage needs no torch, so it is imported where it is used.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from gkd.storage.errors import ConfigError
from gkd.storage.util.torchrun_env import local_rank, own_gpu

Precision = Literal["float32", "float16", "bfloat16"]
T = TypeVar("T")
R = TypeVar("R")

_pools_lock = threading.Lock()


def resolve_device(device: str, *, option: str = "--device") -> str:
    """``auto`` is ``cuda`` if a GPU is usable, else ``cpu``; other names are torch's.

    Under torchrun ``cuda`` is the GPU of this rank's number on its node. ``option`` is where the
    name comes from.

    Raises:
        ConfigError: if there is no such device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = own_cuda(device)
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "cpu":
            return "cpu"
        if not hasattr(torch.get_device_module(device), "Stream"):  # Apple's "mps"
            raise RuntimeError("torch has no streams on it")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            option,
            expected="auto, cpu or a GPU of this machine such as cuda:0",
            got=f"{device!r} ({str(error).splitlines()[0]})",
            remedy="use auto or cpu",
        ) from error
    return device


def own_cuda(device: str) -> str:
    """Under torchrun ``cuda`` becomes the GPU of this rank; other devices stay as they are."""
    import torch

    gpus = torch.cuda.device_count()
    shared = device == "cuda" and local_rank() is not None and gpus
    return f"cuda:{own_gpu(gpus)}" if shared else device


def gpu_id(device: str) -> str:
    """The GPU that ``device`` names, as no other on any machine is called; empty for the CPU."""
    import torch

    try:
        if torch.device(device).type != "cuda":
            return ""
        properties: Any = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):  # another package's GPU, which torch cannot see
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{properties.uuid} {visible if 'MIG' in visible else ''}".strip()


def resolve_precision(
    precision: Precision | Literal["auto"], device: str, *, without_bfloat16: Precision
) -> Precision:
    """``auto`` is float32 on a CPU, and on a GPU bfloat16 or, if it lacks that, another precision.

    Inference takes float16 then. Training takes float32: gradients leave float16's range.
    """
    import torch

    if precision != "auto":
        return precision
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else without_bfloat16


def map_single_threaded(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``function`` of each item on as many threads as torch uses, each operation on one of them.

    The number of threads that share a sum changes its last bits: here results do not depend on it.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    with _pools_lock:
        # A forked process has none of its parent's threads.
        pool = _single_threaded_pool(os.getpid(), threads)
    return list(pool.map(function, items))


@functools.cache
def _single_threaded_pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """A pool of threads whose torch operations use one thread each.

    ``torch.set_num_threads`` acts on the calling thread, and on the process by being the default
    of threads to come. So it is called once for each thread of a pool, which stays, and the
    process's setting is restored at once.
    """
    import torch

    def use_one_thread(_: int) -> None:
        # The first question sets a new thread's number to the process's: ask before setting it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    pool, all_started = ThreadPoolExecutor(threads), threading.Barrier(threads)
    try:
        list(pool.map(use_one_thread, range(threads)))
    finally:
        torch.set_num_threads(threads)
    return pool
