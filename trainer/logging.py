"""What a run tells while it trains: metrics.jsonl, and TensorBoard where it is installed."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gkd.storage.atomic import write_file
from gkd.storage.errors import ConfigError
from gkd.storage.extras import require

METRICS = "metrics.jsonl"


class RunLog:
    """Appends one JSON object a line to ``OUT/metrics.jsonl`` and scalars to TensorBoard.

    Beginning at ``step``, it forgets the lines of later steps, which an interrupted run wrote
    after its last checkpoint and will write again.
    """

    def __init__(self, out: Path, *, step: int) -> None:
        path = out / METRICS
        kept = b""
        if step and path.exists():
            kept = _up_to(path.read_bytes(), step)
        write_file(path, kept)
        self._file = path.open("a")
        self._board = _tensorboard(out / "tensorboard", step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, values: Mapping[str, Any], *, group: str) -> None:
        """Log the values of a step; TensorBoard names them ``group/name``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(f"{group}/{name}", value, step)


def _up_to(content: bytes, step: int) -> bytes:
    """The whole lines whose step is at most ``step``."""
    lines = content.splitlines(keepends=True)
    # A line cut off by a kill ends without a newline.
    return b"".join(x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step)


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
