"""What a run logs while it trains: metrics.jsonl, and TensorBoard if it is installed."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file
from gkd.storage.util.input_files import read_small
from gkd.trainer.head.loss import GkdLoss

METRICS = "metrics.jsonl"
LOSSES = ("loss", "ce", "primary", "binary")


class Window:
    """Sums over the steps since the last line of the log.

    ``state`` carries the losses over an interruption, so that it leaves no trace in the lines;
    times are not carried over.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._losses: Tensor | None = state["losses"] if state else None
        self._taken: int = state["taken"] if state else 0
        self._timed, self._seconds, self._waited = 0, 0.0, 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint: builtins and a tensor."""
        return {"losses": self._losses, "taken": self._taken}

    def add(self, loss: GkdLoss, *, seconds: float, waited: float, skipped: bool) -> None:
        """Add a step that took ``seconds``, of which it ``waited`` for data."""
        if not skipped:
            parts = torch.stack([part.detach() for part in loss])
            self._losses = parts if self._losses is None else self._losses.to(parts) + parts
            self._taken += 1
        self._timed += 1
        self._seconds += seconds
        self._waited += waited

    def means(self, batch_size: int) -> dict[str, Any]:
        """Mean losses, images per second, and the share of the time spent waiting for data.

        Skipped steps do not count for the losses, which are None if all were skipped.
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
    """Appends one JSON object per line to ``OUT/metrics.jsonl`` and scalars to TensorBoard.

    When it starts at ``step``, it drops the lines of later steps, which an interrupted run wrote
    after its last checkpoint and will write again.
    """

    def __init__(self, out: Path, *, step: int) -> None:
        self._path = path = out / METRICS
        self._folder = out / "tensorboard"
        kept = b""
        if step and path.exists():
            kept = b"".join(
                line for _, content, line in read_lines(path) if content["step"] <= step
            )
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
        try:
            for opened, path in ((self._file, self._path), (self._board, self._folder)):
                # A full disk refuses the rest too: the first error has reported it.
                ignored = suppress(OSError, GkdError) if error else nullcontext()
                with ignored, disk_errors(path):
                    if opened is not None:
                        opened.close()
        finally:
            threading.excepthook = self._excepthook

    def _except(self, args: threading.ExceptHookArgs) -> None:
        # An error that ends TensorBoard's thread is raised again when it is given the next value.
        reported = type(args.thread).__module__.startswith("tensorboard.")
        if not (reported and isinstance(args.exc_value, OSError)):
            self._excepthook(args)

    def write(self, step: int, values: Mapping[str, Any], *, group: str) -> None:
        """Log the values of a step; TensorBoard names them ``group/name``."""
        with disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            try:
                with disk_errors(self._folder):
                    for name, value in _scalars(values):
                        self._board.add_scalar(f"{group}/{name}", value, step)
            except (OSError, GkdError):
                raise
            except Exception as error:  # as below
                _report_no_scalars(error)
                self._board = None


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """The complete lines of a log: number, content, bytes. A kill may leave the last incomplete.

    Raises:
        ConfigError: if a line is not a JSON object with a step.
    """
    for number, line in enumerate(
        read_small(path, follow_links=False).splitlines(keepends=True), 1
    ):
        if not line.endswith(b"\n"):
            return
        content: Any = None
        with suppress(ValueError, RecursionError):
            content = json.loads(line)
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise ConfigError(
                f"{path}: line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                "remove the line, or the file to start a new log"
            )
        yield number, content, line


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder, purge_step=step + 1 if step else None)
    except OSError:
        raise
    # Beside another protobuf, setuptools or numpy than its own it raises almost anything.
    except Exception as error:
        _report_no_scalars(error)
        return None


def _report_no_scalars(error: Exception) -> None:
    reason = (
        str(error)
        if isinstance(error, ConfigError)
        else (
            f"tensorboard does not work here ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}); install one that fits its protobuf and "
            "numpy, in the checkout of gkd with: pip install -U '.[tensorboard]'"
        )
    )
    print(f"no TensorBoard scalars: {reason}", file=sys.stderr)
