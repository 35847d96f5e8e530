"""Training by torchrun's ranks: real processes over gloo, against one process."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import open_records
from gkd.trainer.checkpoint import read_checkpoint
from gkd.trainer.data.dataset import check_data
from gkd.trainer.distributed import Ranks, joined_ranks
from gkd.trainer.dry_run import dry_run
from tests.paths import ROOT
from tests.trainer.faces import SMALL, load, run, small_config
from tests.trainer.runs import LAST, assert_same_end, last_centers, losses

# Each rank's BatchNorm sees its own images only: what stays the same is what does not depend on it.
FAST = ("train.epochs=3", "train.batch_size=12", "checkpoint.every_epochs=0.34")


ANY_PORT = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


def torchrun(
    ranks: int, *arguments: object, flags: Sequence[str] = ANY_PORT
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, *flags, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"},
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
    assert f"the same on {ranks}" in finished(torchrun(ranks, "tests.trainer.head.ranked_loss"))


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
    shards = sorted(last_centers(tmp_path / "two").iterdir())
    assert [shape_of(shard) for shard in shards] == [[3, 8], [3, 8]]
    assert (tmp_path / "two/report.html").exists()
    # It learns as one process does.
    assert np.mean([line[2] for line in ours[-3:]]) < np.mean([line[2] for line in ours[:3]])


def test_a_skipped_step_tells_the_records_of_all_ranks(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lost = (
        "optimizer.lr=1e6",
        "train.epochs=9",
        "train.max_skipped=2",
        "checkpoint.every_epochs=9",
    )
    process = train(faces, out, 2, *lost)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "were not finite in 2 steps in a row (train.max_skipped)" in err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [set(line["records"]) for line in lines if "not_finite" in line]
    assert [len(keys) for keys in told] == [12] * len(told)
    assert told


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9, torchrun and its ranks."""
    for each in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        each.kill()
    process.communicate()


@pytest.mark.parametrize("way", ["c10d", "static"])
def test_torchrun_starts_again_when_a_rank_is_killed(faces: Path, tmp_path: Path, way: str) -> None:
    """Its store outlives the restart, with the addresses of the dead."""
    out = tmp_path / "run"
    flags = ANY_PORT if way == "c10d" else (f"--master-port={free_port()}",)
    command = "tests.trainer.faces", faces, out, *FAST, "train.epochs=20"
    process = torchrun(2, *command, flags=(*flags, "--max-restarts=1"))
    wait_for_checkpoint(process, out)
    psutil.Process(process.pid).children()[1].kill()
    assert read_checkpoint(out / LAST)["step"] < 60, "nothing was interrupted"
    finished(process)
    steps = [line[0] for line in losses(out)]
    assert steps == list(range(1, 61))


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
    assert "run the same command again to resume" in err
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
    assert read_checkpoint(out / LAST)["step"] < 9, "nothing was interrupted"
    finished(train(faces, out, 2))
    assert losses(out) == losses(tmp_path / "whole")
    assert_same_end(out, tmp_path / "whole")


def test_what_all_ranks_find_wrong_is_told_once(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", *FAST)
    process = train(faces, tmp_path / "out", 2, "train.seed=1")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("the run was begun with another configuration") == 1


def test_where_the_first_rank_fails_the_others_do_not_wait_for_it(
    faces: Path, tmp_path: Path
) -> None:
    process = train(faces, tmp_path / "out", 2)
    wait_for_checkpoint(process, tmp_path / "out")
    (tmp_path / "out/report.json").mkdir()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "report.json" in err
    assert "onnection closed by peer" not in err


LEAST = """
import sys, time
from datetime import timedelta
from gkd.trainer import distributed as ranks

name, seconds, slow = sys.argv[1:]
setattr(ranks, name, timedelta(seconds=float(seconds)))
with ranks.joined_ranks("cpu") as joined:
    if joined.first:
        time.sleep(float(slow))
    joined.barrier()
"""


def ranked(rank: int, port: int, *arguments: object, **environment: str) -> str:
    """Rank of two on its own, as a process that torchrun started; what it says at its end."""
    env = {"RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    done = subprocess.run(
        [sys.executable, "-c", LEAST, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **env, "MASTER_PORT": f"{port}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    return done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def agent_store() -> Any:
    """What torchrun holds for its ranks to find each other by."""
    host = "localhost", 0
    return dist.TCPStore(*host, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: int) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy\nmore words")

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with (
        pytest.raises(ConfigError, match="expected a GPU for rank 3 of this node, torch finds no"),
        joined_ranks("cuda"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with (
        pytest.raises(ConfigError, match=r"GPU 0 of this node cannot be used \(.* busy\); see"),
        joined_ranks("cuda"),
    ):
        pass


UNREACHED = "ConfigError: the other ranks of WORLD_SIZE=2 cannot be reached"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_torchrun_died_does_not_wait_for_long(rank: int) -> None:
    assert UNREACHED in ranked(rank, free_port(), "ARRIVAL", 2, 0)


def test_a_rank_that_never_comes_is_not_waited_for_for_long() -> None:
    store = agent_store()
    told = ranked(0, store.port, "ARRIVAL", 2, 0, TORCHELASTIC_USE_AGENT_STORE="True")
    assert UNREACHED in told


def test_ranks_that_have_met_wait_for_each_other_as_long_as_patience_says() -> None:
    store = agent_store()
    with ThreadPoolExecutor() as pool:
        told = list(
            pool.map(
                lambda rank: ranked(
                    *(rank, store.port, "PATIENCE", 3, 9), TORCHELASTIC_USE_AGENT_STORE="True"
                ),
                range(2),
            )
        )
    assert "Timed out" in told[1]
    assert UNREACHED not in told[0] + told[1]


def typed(faces: Path, out: Path, *more: str) -> list[object]:
    """``gkd train-student`` on two ranks' worth of data."""
    settings = [word for setting in (*SMALL, *FAST) for word in ("--set", setting)]
    return ["train-student", faces / "faces", faces / "targets.gkd", out, *settings, *more]


def test_a_dry_run_of_ranks_tells_once_what_one_of_them_takes(faces: Path, tmp_path: Path) -> None:
    command = typed(faces, tmp_path / "run", "--dry-run")
    told = json.loads(finished(torchrun(2, "gkd.cli", *command, "--json")))
    records = open_records(faces / "faces")
    settings = (*FAST, "kd.enabled=false")
    both, half = (
        dry_run(small_config(*settings, f"train.batch_size={size}"), records, None)
        for size in (12, 6)
    )
    assert told["ranks"] == 2
    assert told["memory"]["class_centers"] == 3 * 8 * 4
    for part in ("activations", "images"):
        assert told["memory"][part] == half.memory[part] < both.memory[part]
    learning = both.parameters["learning"] - 6 * 8
    assert told["memory"]["gradients_sent"] == 4 * learning
    assert told["memory"]["gradients"] == told["memory"]["optimizer_state"] == 4 * (learning + 24)
    for whole in ("parameters", "flops_per_step", "total_steps"):
        assert told[whole] == getattr(both, whole)
    shown = finished(torchrun(2, "gkd.cli", *command))
    assert shown.count("memory of one of 2 ranks, class centers") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_of_ranks_is_told_with_its_launcher(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = typed(faces, out, "--set", "train.gradient_hook=bfloat16")
    finished(torchrun(2, "gkd.cli", *command))
    described = json.loads((out / "run.json").read_text())
    expected = ["torchrun", "--nproc-per-node=2", "-m", "gkd.cli", *map(str, command)]
    assert described["command"] == expected
    page = (out / "report.html").read_text()
    assert "torchrun --nproc-per-node=2 -m gkd.cli train-student" in page
    assert re.search(r"<td[^>]*>Ranks</td><td[^>]*>2</td>", page)


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
    config = small_config(f"train.batch_size={batch_size}")
    with pytest.raises(ConfigError, match=message):
        check_data(config, records, targets, world_size=ranks)


def test_rows_of_ranks_are_all_rows() -> None:
    for count, size in ((10, 3), (6, 2), (7, 7)):
        parts = [list(Ranks(rank, size).rows(count)) for rank in range(size)]
        assert list(itertools.chain(*parts)) == list(range(count))
