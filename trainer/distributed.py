"""The processes that train together: torchrun's ranks, or this process alone."""

import functools
import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util import torchrun_env
from gkd.storage.util.rendezvous import ARRIVAL, Wait, meet
from gkd.storage.util.torch_device import gpu_id

T = TypeVar("T")

# Once all have met a rank may wait long, while another evaluates or prepares data; torchrun ends
# those whose peers died.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process's rank among ``world_size``. Every method is called by all ranks."""

    rank: int = 0
    world_size: int = 1
    watch: "Watch | None" = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs, evaluates and writes."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This rank's part of ``count`` rows, divided as DTensor divides them."""
        size = -(-count // self.world_size)
        return range(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def all_reduce_max(self, value: int) -> int:
        """The maximum of the ranks' values."""
        return int(self.elementwise_max(torch.tensor(value)).item())

    def elementwise_max(self, values: Tensor) -> Tensor:
        """The elementwise maximum of the ranks' CPU tensors of one shape."""
        if self.world_size == 1:
            return values
        with self.watch or nullcontext():
            values = values.to(_collective_device())
            dist.all_reduce(values, dist.ReduceOp.MAX)
            return values.cpu()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ranks' tensors of one shape; overwrites this rank's."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def logsumexp(self, values: Tensor) -> Tensor:
        """The logsumexp of the ranks' tensors of one shape."""
        return values if self.world_size == 1 else self.gather(values[None]).logsumexp(0)

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' tensors [n, ...] of one shape, concatenated."""
        if self.world_size == 1:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    def gather_ragged(self, part: Tensor, counts: list[int]) -> Tensor:
        """The ranks' vectors, of ``counts`` elements each, concatenated."""
        longest = max(counts)
        padded = self.gather(F.pad(part, (0, longest - len(part)))).view(len(counts), longest)
        return torch.cat([row[:count] for row, count in zip(padded, counts, strict=True)])

    def gather_with_gradient(self, part: Tensor) -> Tensor:
        """``gather`` with a gradient.

        The gradient of a rank's part is its part of the result's gradient, which must be equal on
        all ranks, times the number of ranks.
        """
        if self.world_size == 1:
            return part
        gathered: Tensor = _Gather.apply(part, self)
        return gathered

    def run_all_or_abort(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on this rank; if any rank fails, all end and one says why.

        ``work`` must not contain collectives: another rank would wait in vain for its part of one.
        """
        error: Exception | None = None
        results: list[T] = []
        try:
            results.append(work())
        except Exception as met:
            error = met
        mine = self.world_size - self.rank
        worst = self.all_reduce_max(0 if error is None else mine)
        if error is not None and worst == mine:
            raise error
        if worst:
            raise SystemExit(1)
        return results[0]

    def fail(self, message: str) -> NoReturn:
        """End all ranks; the first gives the reason."""
        raise GkdError(message) if self.first else SystemExit(1)

    def broadcast(self, value: T) -> T:
        """The first rank's value, a plain object."""
        if self.world_size == 1:
            return value
        values = [value]
        with self.watch or nullcontext():
            dist.broadcast_object_list(values, src=0, device=_collective_device())
        return values[0]

    def parallel(
        self, model: nn.Module, *, allreduce_dtype: Literal["float32", "float16", "bfloat16"]
    ) -> nn.Module:
        """The model with gradients averaged over the ranks, sent in ``allreduce_dtype``."""
        if self.world_size == 1:
            return model
        parallel = DistributedDataParallel(model)
        parallel.broadcast_buffers = False  # the argument of this name is deprecated by torch 2.13
        if allreduce_dtype != "float32":
            dtype = torch.float16 if allreduce_dtype == "float16" else torch.bfloat16
            parallel.register_comm_hook(dtype, _rounded_mean)
        return parallel

    def scaler(self, device: torch.device, *, enabled: bool) -> torch.amp.GradScaler:
        """A gradient scaler; if any rank's gradient is not finite, all ranks skip the step."""
        if self.world_size == 1:
            return torch.amp.GradScaler(device.type, enabled=enabled)
        return ShardedGradScaler(device.type, enabled=enabled)

    def sharded(self, part: Tensor, count: int) -> Tensor:
        """The ranks' ``rows`` of a tensor [count, ...] as one DTensor; alone, the tensor itself."""
        if self.world_size == 1:
            return part
        shape = torch.Size((count, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(_collective_device().type, (self.world_size,))


class Watch:
    """Says for which ranks this one waits; its context is the wait, of all ranks for each other.

    They wait in C++, so a thread looks on. Each rank that has waited for a second says in the store
    which of its waits this is: who has not got as far is waited for.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(world_size) if other != rank]
        self._count = 0
        self._wait: Wait | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()

    def __enter__(self) -> None:
        self._count += 1
        self._wait = Wait("to go on", PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._wait = None

    def end(self) -> None:
        """End the thread."""
        self._ended.set()

    def _look_on(self) -> None:
        with suppress(RuntimeError):  # the store is gone: the wait itself reports it
            while not self._ended.wait(1.0):
                count, wait = self._count, self._wait
                if wait is not None:
                    self._store.set(f"wait/{self._rank}", str(count))
                    wait.say(lambda: [n for n in self._others if self._waits_of(n) < self._count])

    def _waits_of(self, rank: int) -> int:
        key = f"wait/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.size = ranks, len(part)
        return ranks.gather(part)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.size
        return grads[0][start : start + ctx.size] * ctx.ranks.world_size, None


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined until the end, or this process alone.

    ``device`` is cpu or cuda and decides the backend: gloo or NCCL. Call this before anything that
    takes one rank longer than another: ranks wait ``ARRIVAL`` for each other here, and
    ``PATIENCE`` afterwards.

    Raises:
        ConfigError: if the other ranks cannot be reached, or a rank has no GPU.
    """
    rank, world_size = torchrun_env.rank(), torchrun_env.world_size()
    if world_size == 1:
        torchrun_env.note_other_launcher()
        yield ALONE
        return
    gpu = ""
    if device == "cuda":
        _take_gpu(torch.cuda.device_count())
        gpu = gpu_id(f"cuda:{torch.cuda.current_device()}")
    shared, attempt = meet(ARRIVAL, gpu=gpu)
    store = PrefixStore(attempt, shared)
    shared.set_timeout(PATIENCE)
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the other ranks of WORLD_SIZE={world_size} cannot be reached ({error}); see why they "
            "ended, or start all of them with torchrun"
        ) from error
    watch = Watch(store, rank, world_size)
    try:
        yield Ranks(rank, world_size, watch)
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        watch.end()
        # If DDP's reducer were the last to hold the group, it would destroy it while holding the
        # interpreter's lock, and wait for a thread of the group that may want the lock.
        gc.collect()
        dist.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Release the local variables of the functions that an error passed through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _take_gpu(gpus: int) -> None:
    """Select this rank's GPU among the ``gpus`` that are visible.

    Raises:
        ConfigError: if none is visible, or this rank's cannot be used.
    """
    if not gpus:
        raise ConfigError(
            f"train.device: expected a GPU for rank {torchrun_env.local_rank() or 0} of this node, "
            "torch finds none; show it one with CUDA_VISIBLE_DEVICES, or set train.device=cpu"
        )
    number = torchrun_env.own_gpu(gpus)
    try:
        torch.cuda.set_device(number)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"train.device: GPU {number} of this node cannot be used ({reason}); see with "
            "nvidia-smi whether it is free, or set train.device=cpu"
        ) from error


def _rounded_mean(
    dtype: torch.dtype,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean of the ranks' gradients, sent in ``dtype``.

    torch's own hook for bfloat16 refuses gloo, which can send it.
    """
    gradients: Tensor = bucket.buffer()
    rounded = gradients.to(dtype).div_(dist.get_world_size())
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(
        lambda sent: gradients.copy_(sent.value()[0])
    )
    return future


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
