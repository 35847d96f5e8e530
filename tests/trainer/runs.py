"""Runs in other processes, and bit-for-bit comparisons of run folders."""

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkd.trainer.checkpoint import read_checkpoint
from tests.processes import Process, running, running_ranks
from tests.trainer.faces import run_process

LAST = "checkpoints/last.pt"
# A batch that 2 and 3 ranks can share; each rank's BatchNorm sees its own images only.
FAST = ("train.epochs=3", "train.batch_size=12", "checkpoint.every_epochs=0.34")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def training_lines(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out) if "loss" in line]


def losses(out: Path) -> list[tuple[int, float, float, float, float]]:
    """Step, loss, CE, Primary and Binary of each line that has a step with a loss."""
    names = ("step", "loss", "ce", "primary", "binary")
    lines = training_lines(out)
    return [tuple(line[name] for name in names) for line in lines if line["loss"] is not None]


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Bit by bit, whatever the nesting."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_state(one, other)
    else:
        assert ours == theirs


def assert_same_end(ours: Path, theirs: Path) -> None:
    """The last checkpoints of two runs, and the class centres that they name."""
    assert_same_state(read_checkpoint(ours / LAST), read_checkpoint(theirs / LAST))
    assert_same_state(centers_of(ours), centers_of(theirs))


def centers_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By the file of each rank."""
    return {file.name: load_file(file) for file in sorted(last_centers(out).iterdir())}


def last_centers(out: Path) -> Path:
    folder: str = read_checkpoint(out / LAST)["centers"]["folder"]
    return out / "checkpoints" / folder


def started(faces: Path, out: Path, *overrides: str) -> AbstractContextManager[Process]:
    """A training in another process, which does not outlive the block."""
    return running(run_process, faces, out, *overrides)


def ranks_training(
    faces: Path, out: Path, count: int, *overrides: str
) -> AbstractContextManager[list[Process]]:
    """A training by several ranks, by default a short one."""
    return running_ranks(count, run_process, faces, out, *FAST, *overrides)


def wait_for_step(process: Process, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(lines_so_far(out)) >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"no step {step}: {process.err}")


def lines_so_far(out: Path) -> list[bytes]:
    return (out / "metrics.jsonl").read_bytes().splitlines()
