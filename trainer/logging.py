"""What a run tells while it trains: metrics.jsonl, and TensorBoard where it is installed."""

import json
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file
from gkd.trainer.head.loss import GkdLoss

METRICS = "metrics.jsonl"
LOSSES = ("loss", "ce", "primary", "binary")


class Window:
    """Sums over the steps since the last line of the log.

    Their losses outlive an interruption by ``state``, so that the lines do not tell of it; their
    times do not.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._losses: Tensor | None = state["losses"] if state else None
        self._taken: int = state["taken"] if state else 0
        self._timed, self._seconds, self._waited = 0, 0.0, 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint: builtins and a tensor."""
        return {"losses": self._losses, "taken": self._taken}

    def add(self, loss: GkdLoss, *, seconds: float, waited: float, skipped: bool) -> None:
        """Take one more step into account: how long it took, and how much of that for its data."""
        if not skipped:
            parts = torch.stack([part.detach() for part in loss])
            self._losses = parts if self._losses is None else self._losses.to(parts) + parts
            self._taken += 1
        self._timed += 1
        self._seconds += seconds
        self._waited += waited

    def means(self, batch_size: int) -> dict[str, Any]:
        """Mean losses, images a second, and the share of the time spent waiting for data.

        The losses are those of steps that were taken; None where every one was skipped.
        """
        means: list[float | None] = [None] * len(LOSSES)
        if self._losses is not None:
            means = (self._losses / self._taken).tolist()
        return {
            **dict(zip(LOSSES, means, strict=True)),
            "images_per_second": self._timed * batch_size / self._seconds,
            "data_wait": self._waited / self._seconds,
        }


class RunLog:
    """Appends one JSON object a line to ``OUT/metrics.jsonl`` and scalars to TensorBoard.

    Beginning at ``step``, it forgets the lines of later steps, which an interrupted run wrote
    after its last checkpoint and will write again.
    """

    def __init__(self, out: Path, *, step: int) -> None:
        self._path = path = out / METRICS
        self._folder = out / "tensorboard"
        kept = b""
        if step and path.exists():
            kept = _up_to(path, step)
        with disk_errors(path):
            write_file(path, kept)
        self._file = path.open("a")
        self._excepthook, threading.excepthook = threading.excepthook, self._except
        self._board = _tensorboard(self._folder, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A full disk refuses the rest again: the first error tells of it.
        with suppress(OSError, GkdError) if error else nullcontext(), disk_errors(self._path):
            self._file.close()
        try:
            with suppress(OSError, GkdError) if error else nullcontext(), disk_errors(self._folder):
                if self._board is not None:
                    self._board.close()
        finally:
            threading.excepthook = self._excepthook

    def _except(self, args: threading.ExceptHookArgs) -> None:
        # What ends TensorBoard's thread is raised again by the next value that it is given.
        told = type(args.thread).__module__.startswith("tensorboard.")
        if not (told and isinstance(args.exc_value, OSError)):
            self._excepthook(args)

    def write(self, step: int, values: Mapping[str, Any], *, group: str) -> None:
        """Log the values of a step; TensorBoard names them ``group/name``."""
        with disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            with disk_errors(self._folder):
                for name, value in _scalars(values):
                    self._board.add_scalar(f"{group}/{name}", value, step)


def _up_to(path: Path, step: int) -> bytes:
    """The whole lines of a log whose step is at most ``step``."""

    def is_kept(number: int, line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] <= step)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                "remove the line, or the file to begin the log again"
            ) from error

    lines = path.read_bytes().splitlines(keepends=True)
    # A line cut off by a kill ends without a newline.
    whole = [line for line in lines if line.endswith(b"\n")]
    return b"".join(line for number, line in enumerate(whole, 1) if is_kept(number, line))


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            scalars.append((prefix + name, value))
    return scalars


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        require("tensorboard", "tensorboard")
    except ConfigError as error:
        print(f"no TensorBoard scalars: {error}", file=sys.stderr)
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1 if step else None)
