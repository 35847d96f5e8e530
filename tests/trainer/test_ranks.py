"""Training by torchrun's ranks: real processes over gloo, against one process."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors import safe_open

from gkd.storage.errors import ConfigError
from gkd.trainer.checkpoint import read_checkpoint
from gkd.trainer.config import KdConfig
from gkd.trainer.data import check_data
from gkd.trainer.ranks import Ranks
from tests.paths import ROOT
from tests.trainer.faces import load, run
from tests.trainer.test_loop import LAST, losses

# Each rank's BatchNorm sees its own images only: what stays the same is what does not depend on it.
FAST = ("train.epochs=3", "train.batch_size=12", "checkpoint.every_epochs=0.34")


def torchrun(ranks: int, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [*command, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loss_of_ranks_is_that_of_one_process(ranks: int) -> None:
    assert f"the same on {ranks}" in finished(torchrun(ranks, "tests.trainer.ranked_loss"))


def train(faces: Path, out: Path, ranks: int, *settings: str) -> "subprocess.Popen[str]":
    return torchrun(ranks, "tests.trainer.faces", faces, out, *FAST, *settings)


def test_two_ranks_train_as_told(faces: Path, tmp_path: Path) -> None:
    finished(train(faces, tmp_path / "two", 2, f'evaluation.sets=["{faces}/pairs.bin"]'))
    run(faces, tmp_path / "one", *FAST)
    ours, theirs = (losses(tmp_path / name) for name in ("two", "one"))
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    described = json.loads((tmp_path / "two/run.json").read_text())
    assert described["ranks"] == 2
    assert described["parameters"]["head"] == 6 * 8
    shards = sorted((tmp_path / "two/checkpoints").glob("centers_*/*.safetensors"))
    assert [shape_of(shard) for shard in shards] == [[3, 8], [3, 8]]
    assert (tmp_path / "two/report.html").exists()
    # It learns as one process does.
    assert np.mean([line[2] for line in ours[-3:]]) < np.mean([line[2] for line in ours[:3]])


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9, torchrun and its ranks."""
    for each in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        each.kill()
    process.communicate()


def shape_of(file: Path) -> list[int]:
    with safe_open(file, "np") as opened:
        shape: list[int] = opened.get_slice("weight").get_shape()
    return shape


def test_killed_and_resumed_by_other_numbers_of_ranks(faces: Path, tmp_path: Path) -> None:
    """2 ranks killed, 1, then 3: every step is logged once, and the class centres go along."""
    out = tmp_path / "run"
    process = train(faces, out, 2, "train.epochs=200")
    wait_for_checkpoint(process, out)
    kill(process)
    killed_at = read_checkpoint(out / LAST)["step"]
    process = train(faces, out, 1, "train.epochs=200")
    wait_for_checkpoint(process, out, after=killed_at)
    process.terminate()
    process.communicate(timeout=60)
    stopped_at = read_checkpoint(out / LAST)["step"]
    assert stopped_at > killed_at
    process = train(faces, out, 3, "train.epochs=200")
    wait_for_checkpoint(process, out, after=stopped_at)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "run the same command again to go on" in err
    steps = [line[0] for line in losses(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > stopped_at


def wait_for_checkpoint(process: "subprocess.Popen[str]", out: Path, *, after: int = 0) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / LAST).exists() and read_checkpoint(out / LAST)["step"] > after:
            return
        time.sleep(0.1)
    kill(process)
    pytest.fail(f"no checkpoint after step {after}")


def test_the_same_ranks_end_in_the_same_bits(faces: Path, tmp_path: Path) -> None:
    """Interrupted between two ranks' steps and gone on with, the losses are those of one go."""
    finished(train(faces, tmp_path / "whole", 2))
    out = tmp_path / "parts"
    process = train(faces, out, 2)
    wait_for_checkpoint(process, out)
    kill(process)
    finished(train(faces, out, 2))
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("batch_size", "ranks", "message"),
    [
        (8, 3, "expected a multiple of the 3 ranks"),
        (3, 3, "with 2 images or more for each, got 3"),
        (8, 4, "expected classes for each of 4 ranks, got 6; start fewer ranks"),
    ],
)
def test_ranks_that_cannot_share_are_refused(
    faces: Path, batch_size: int, ranks: int, message: str
) -> None:
    records, targets = load(faces)
    with pytest.raises(ConfigError, match=message):
        check_data(
            records,
            targets,
            batch_size=batch_size,
            flip=True,
            kd=KdConfig(),
            world_size=ranks,
        )


def test_rows_of_ranks_are_all_rows() -> None:
    for count, size in ((10, 3), (6, 2), (7, 7)):
        parts = [list(Ranks(rank, size).rows(count)) for rank in range(size)]
        assert list(itertools.chain(*parts)) == list(range(count))
