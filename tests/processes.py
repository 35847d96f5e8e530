"""Processes for tests, forked from one that has imported torch and gkd already.

A new Python pays two seconds of processor time for torch; a process forked here pays none. Each
runs one function in a session of its own, and what it prints is collected.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from tests.paths import ROOT

PRELOAD = ["pytest", "gkd.cli", "tests.caches"]
PRELOAD_WITH_TORCH = [
    *PRELOAD,
    *("tests.trainer.faces", "tests.pipeline.faces"),
    # What a training imports late.
    *("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure"),
]


class Process:
    """A process that runs one function of an importable module; end it with ``kill``."""

    def __init__(
        self, function: Callable[..., object], arguments: Sequence[Any], env: Mapping[str, str]
    ) -> None:
        _start_server()
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self._printed: list[list[bytes]] = [[], []]
        self._process = context.Process(
            target=_run,
            args=([send for _, send in pipes], {**os.environ, **env}, function, arguments),
        )
        self._process.start()
        self._readers = []
        for (receive, send), printed in zip(pipes, self._printed, strict=True):
            send.close()
            reader = threading.Thread(target=_read, args=(receive, printed), daemon=True)
            reader.start()
            self._readers.append(reader)

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def out(self) -> str:
        """What it printed so far to stdout."""
        return b"".join(self._printed[0]).decode()

    @property
    def err(self) -> str:
        """What it printed so far to stderr."""
        return b"".join(self._printed[1]).decode()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Its exit code, minus the signal's number if a signal killed it."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"process {self.pid} runs after {timeout} s; it printed {self.err}"
        for reader in self._readers:
            reader.join(5)  # a process that it started may hold the pipe open
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """``kill -9``, and wait for its end."""
        self._process.kill()
        self.wait()


@contextmanager
def running(
    function: Callable[..., object], *arguments: Any, env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """A process that does not outlive the block."""
    process = Process(function, arguments, env or {})
    try:
        yield process
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # those that it started
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def running_ranks(
    count: int, function: Callable[..., object], *arguments: Any, start: int | None = None
) -> Iterator[list[Process]]:
    """The ranks of one training, the first ``start`` of them, in torchrun's environment."""
    import torch.distributed as dist

    # As torchrun's agent does, keep the store by which the ranks find each other.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shared = {
        "WORLD_SIZE": f"{count}",
        "LOCAL_WORLD_SIZE": f"{count}",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": f"{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running(function, *arguments, env={**shared, "RANK": rank, "LOCAL_RANK": rank})
            )
            for rank in map(str, range(start or count))
        ]


def finished(processes: Sequence[Process]) -> list[str]:
    """What each printed to stdout, once all have ended without an error."""
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(processes), "\n".join(process.err for process in processes)
    return [process.out for process in processes]


def run_command(*arguments: object) -> None:
    """``gkd ARGUMENTS``, as the process itself."""
    from gkd.cli import main

    sys.argv = ["gkd", *map(str, arguments)]
    main()


def stop_server() -> None:
    """End the process that others are forked from, if it was started."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _start_server() -> None:
    # Tests of storage alone run without torch.
    forkserver.set_forkserver_preload(PRELOAD_WITH_TORCH if "torch" in sys.modules else PRELOAD)
    with _environment(
        PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]),
        OMP_NUM_THREADS="1",
    ):
        forkserver.ensure_running()


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _read(receive: Connection, printed: list[bytes]) -> None:
    with receive:
        while part := os.read(receive.fileno(), 1 << 16):
            printed.append(part)


def _run(
    sends: Sequence[Connection],
    environment: Mapping[str, str],
    function: Callable[..., object],
    arguments: Sequence[Any],
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    warnings.simplefilter("error", FutureWarning)
    os.chdir(ROOT)
    for number, send in zip((1, 2), sends, strict=True):
        os.dup2(send.fileno(), number)
        send.close()
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
