"""Training by several ranks: real processes over gloo, against one process."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open

from gkd.storage.errors import ConfigError
from gkd.storage.records.open import open_records
from gkd.trainer import distributed
from gkd.trainer.checkpoint import read_checkpoint
from gkd.trainer.data.checks import check_data
from gkd.trainer.distributed import Ranks, joined_ranks
from gkd.trainer.dry_run import dry_run
from tests.paths import ROOT
from tests.processes import Process, finished, run_command, running, running_ranks
from tests.trainer.faces import SMALL, load, run, small_config
from tests.trainer.head import ranked_loss
from tests.trainer.runs import FAST, LAST, assert_same_end, last_centers, losses, ranks_training


@pytest.mark.parametrize("count", [2, 3])
def test_the_loss_of_ranks_is_that_of_one_process(count: int) -> None:
    with running_ranks(count, ranked_loss.main) as ranks:
        assert finished(ranks)[0] == f"the same on {count}\n"


def test_two_ranks_train_as_configured(faces: Path, tmp_path: Path) -> None:
    with ranks_training(
        faces, tmp_path / "two", 2, f'evaluation.sets=["{faces}/pairs.bin"]'
    ) as two:
        finished(two)
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


def shape_of(file: Path) -> list[int]:
    with safe_open(file, "np") as opened:
        shape: list[int] = opened.get_slice("weight").get_shape()
    return shape


def failed(ranks: Sequence[Process]) -> str:
    """What all ranks printed to stderr, once each has ended with an error."""
    assert [rank.wait(timeout=120) for rank in ranks] == [1] * len(ranks)
    return "".join(rank.err for rank in ranks)


def test_a_skipped_step_names_the_records_of_all_ranks(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overflow = (
        "optimizer.lr=1e6",
        "train.epochs=9",
        "train.max_skipped=2",
        "checkpoint.every_epochs=9",
    )
    with ranks_training(faces, out, 2, *overflow) as ranks:
        assert "were not finite in 2 steps in a row (train.max_skipped)" in failed(ranks)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    named = [set(line["records"]) for line in lines if "not_finite" in line]
    assert [len(keys) for keys in named] == [12] * len(named)
    assert named


def command_line(faces: Path, out: Path, *more: str) -> list[object]:
    """``gkd train-student`` on two ranks' worth of data."""
    settings = [word for setting in (*SMALL, *FAST) for word in ("--set", setting)]
    return ["train-student", faces / "faces", faces / "targets.gkd", out, *settings, *more]


@pytest.mark.nightly  # the pipeline's torchrun is killed and restarted in every check
@pytest.mark.parametrize("way", ["c10d", "static"])
def test_torchrun_restarts_after_a_rank_is_killed(faces: Path, tmp_path: Path, way: str) -> None:
    """Its store outlives the restart, with the addresses of the dead."""
    out = tmp_path / "run"
    flags = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    flags = flags if way == "c10d" else [f"--master-port={free_port()}"]
    bfloat16 = ("--set", "train.allreduce_dtype=bfloat16")
    arguments = command_line(faces, out, "--set", "train.epochs=20", *bfloat16)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*launcher, *flags, "--max-restarts=1", "-m", "gkd.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error::FutureWarning"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for_checkpoint(process, out)
            psutil.Process(process.pid).children()[1].kill()
            assert read_checkpoint(out / LAST)["step"] < 60, "the training was over"
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        finally:
            process.terminate()  # the launcher ends its ranks
    assert [line[0] for line in losses(out)] == list(range(1, 61))
    described = json.loads((out / "run.json").read_text())
    expected = ["torchrun", "--nproc-per-node=2", "-m", "gkd.cli", *map(str, arguments)]
    assert described["command"] == expected
    page = (out / "report.html").read_text()
    assert "torchrun --nproc-per-node=2 -m gkd.cli train-student" in page
    assert re.search(r"<td[^>]*>Ranks</td><td[^>]*>2</td>", page)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def wait_for_checkpoint(
    process: "Process | subprocess.Popen[str]", out: Path, *, after: int = 0
) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (out / LAST).exists() and read_checkpoint(out / LAST)["step"] > after:
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint after step {after}")


def test_the_same_ranks_end_in_the_same_bits(faces: Path, tmp_path: Path) -> None:
    """Killed between two ranks' steps and resumed, the losses are those of an unbroken run."""
    with ranks_training(faces, tmp_path / "unbroken", 2) as ranks:
        finished(ranks)
    out = tmp_path / "killed"
    with ranks_training(faces, out, 2) as ranks:
        wait_for_checkpoint(ranks[0], out)
    assert read_checkpoint(out / LAST)["step"] < 9, "the training was over"
    with ranks_training(faces, out, 2) as ranks:
        finished(ranks)
    assert losses(out) == losses(tmp_path / "unbroken")
    assert_same_end(out, tmp_path / "unbroken")


def test_killed_and_resumed_by_other_numbers_of_ranks(faces: Path, tmp_path: Path) -> None:
    """2 ranks killed, 1, then 3: every step is logged once, and the class centres go along."""
    out = tmp_path / "run"
    with ranks_training(faces, out, 2, "train.epochs=200") as ranks:
        wait_for_checkpoint(ranks[0], out)
    for count in (1, 3):
        step = read_checkpoint(out / LAST)["step"]
        with ranks_training(faces, out, count, "train.epochs=200") as ranks:
            wait_for_checkpoint(ranks[0], out, after=step)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            assert "run the same command again" in failed(ranks)
    steps = [line[0] for line in losses(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > step


def test_an_error_of_all_ranks_is_printed_once(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", *FAST)
    with ranks_training(faces, tmp_path / "out", 2, "train.seed=1") as ranks:
        assert failed(ranks).count("the run was started with another configuration") == 1


def test_if_the_first_rank_fails_the_others_do_not_wait_for_it(faces: Path, tmp_path: Path) -> None:
    with ranks_training(faces, tmp_path / "out", 2) as ranks:
        wait_for_checkpoint(ranks[0], tmp_path / "out")
        (tmp_path / "out/report.json").mkdir()
        err = failed(ranks)
    assert "report.json" in err
    assert "onnection closed by peer" not in err


def meet(name: str, seconds: float, sleep: float) -> None:
    """Join the other ranks with a shorter time limit; the first then sleeps."""
    setattr(distributed, name, timedelta(seconds=seconds))
    with joined_ranks("cpu") as ranks:
        if ranks.first:
            time.sleep(sleep)
        ranks.all_reduce_max(0)


def test_a_rank_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: int) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy\nmore words")

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
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


UNREACHED = "of WORLD_SIZE=2 did not arrive at localhost:"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_torchrun_died_gives_up_soon(rank: int) -> None:
    env = {"RANK": f"{rank}", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{free_port()}"}
    with running(meet, "ARRIVAL", 2, 0, env=env) as process:
        assert f"ConfigError: rank {1 - rank} {UNREACHED}" in failed([process])


def test_a_rank_that_never_arrives_is_given_up_soon() -> None:
    with running_ranks(2, meet, "ARRIVAL", 2, 0, start=1) as ranks:
        assert f"rank 1 {UNREACHED}" in failed(ranks)


def test_ranks_that_have_met_wait_for_each_other_as_long_as_patience_says() -> None:
    with running_ranks(2, meet, "PATIENCE", 5, 9) as ranks:
        printed = failed(ranks)
        assert "Timed out" in ranks[1].err
        assert re.search(r"rank 1 of 2 has waited [34] s for rank 0 to go on", ranks[1].err)
    assert UNREACHED not in printed


def test_a_dry_run_of_ranks_prints_once_what_one_of_them_needs(faces: Path, tmp_path: Path) -> None:
    command = command_line(faces, tmp_path / "run", "--dry-run")
    with running_ranks(2, run_command, *command, "--json") as ranks:
        printed = finished(ranks)
    cost = json.loads("".join(printed))
    records = open_records(faces / "faces")
    settings = (*FAST, "kd.enabled=false")
    both, half = (
        dry_run(small_config(*settings, f"train.batch_size={size}"), records, None)
        for size in (12, 6)
    )
    assert cost["ranks"] == 2
    assert cost["memory"]["class_centers"] == 3 * 8 * 4
    for part in ("activations", "images"):
        assert cost["memory"][part] == half.memory[part] < both.memory[part]
    learning = both.parameters["trainable"] - 6 * 8
    assert cost["memory"]["gradients_sent"] == 4 * learning
    assert cost["memory"]["gradients"] == cost["memory"]["optimizer_state"] == 4 * (learning + 24)
    for name in ("parameters", "flops_per_step", "total_steps"):
        assert cost[name] == getattr(both, name)
    with running_ranks(2, run_command, *command) as ranks:
        shown = "".join(finished(ranks))
    assert shown.count("memory of one of 2 ranks, class centers") == 1
    assert not (tmp_path / "run").exists()


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
