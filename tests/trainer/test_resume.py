"""Trainings that are interrupted in every way resume to the same bits, and report why."""

import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.trainer import checkpoint, loop
from gkd.trainer.checkpoint import read_checkpoint, write_checkpoint
from gkd.trainer.config_file import load_config
from gkd.trainer.evaluation.embed import evaluate
from gkd.trainer.final_metrics import read_final_metrics
from gkd.trainer.loop import train
from gkd.trainer.state import RunState
from tests.processes import running
from tests.trainer.faces import load, run, run_process, small_config
from tests.trainer.runs import (
    LAST,
    assert_same_end,
    assert_same_state,
    centers_of,
    last_centers,
    lines,
    losses,
    started,
    training_lines,
    wait_for_step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_finished_run_is_left_unchanged(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    summary = run(faces, tmp_path / "out", f'evaluation.sets=["{faces}/pairs.bin"]')
    assert summary.steps == 15
    assert summary.accuracy.keys() == {"pairs"}
    assert (tmp_path / "out" / LAST).read_bytes() == (unbroken / LAST).read_bytes()
    assert lines(tmp_path / "out") == lines(unbroken)


@pytest.mark.parametrize(
    "more", [("head.sample_rate=0.4",), pytest.param((), marks=pytest.mark.nightly)]
)
def test_a_killed_run_resumes_to_the_same_bits(
    faces: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """kill -9 at random steps, each time the same command again; two workers."""
    overrides = ("train.epochs=8", "checkpoint.every_epochs=0.4", "data.workers=2", *more)
    run(faces, tmp_path / "unbroken", *overrides)
    out = tmp_path / "killed"
    dice = random.Random(4)
    for target in (dice.randint(3, 15), dice.randint(20, 32)):
        with started(faces, out, *overrides) as process:
            wait_for_step(process, out, target)
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert read_checkpoint(out / LAST)["step"] < 40
    run(faces, out, *overrides)
    assert_same_end(out, tmp_path / "unbroken")
    assert losses(out) == losses(tmp_path / "unbroken")


@pytest.mark.parametrize("at", [4, 7])
def test_an_interruption_leaves_no_trace_in_the_log(
    faces: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Lines are means over the steps up to a multiple of 3 or the end of an epoch."""
    take_step, overrides = RunState.take_step, ("train.log_every=3", "checkpoint.every_epochs=0.4")

    def cut_off(state: RunState, *given: Any) -> Any:
        if state.step == at:
            raise MemoryError
        return take_step(state, *given)

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "take_step", cut_off)
        with pytest.raises(MemoryError):
            run(faces, tmp_path / "out", *overrides)
    assert read_checkpoint(tmp_path / "out" / LAST)["step"] == {4: 4, 7: 6}[at]
    run(faces, tmp_path / "out", *overrides)
    every = {step: parts for step, *parts in losses(unbroken)}
    seen = losses(tmp_path / "out")
    assert [step for step, *_ in seen] == [3, 5, 6, 9, 10, 12, 15]
    for begin, (end, *parts) in zip([0, *(step for step, *_ in seen)], seen, strict=False):
        means = np.mean([every[step] for step in range(begin + 1, end + 1)], 0)
        np.testing.assert_allclose(parts, means, rtol=1e-5)


@pytest.mark.parametrize("ends", [1, 3])
def test_a_run_killed_in_an_evaluation_resumes_with_it(
    faces: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    """After an epoch in between and after the last: the steps before are not lost."""
    sets = f'evaluation.sets=["{faces}/pairs.bin"]'
    done = 0

    def cut_off(*given: Any) -> Any:
        nonlocal done
        done += 1
        if done == ends:
            raise MemoryError
        return evaluate(*given)

    monkeypatch.setattr(loop, "evaluate", cut_off)
    with pytest.raises(MemoryError):
        run(faces, tmp_path / "out", sets)
    assert read_checkpoint(tmp_path / "out" / LAST)["step"] == 5 * ends
    run(faces, tmp_path / "out", sets)
    assert_same_end(tmp_path / "out", unbroken)
    ours, theirs = (
        [line for line in lines(out) if "accuracy" in line] for out in (tmp_path / "out", unbroken)
    )
    assert ours == theirs
    fits = [read_final_metrics(out) for out in (tmp_path / "out", unbroken)]
    assert fits[0] == fits[1]


def test_the_best_checkpoint_can_be_resumed(faces: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "out", f'evaluation.sets=["{faces}/pairs.bin"]'
    run(faces, out, sets, "train.epochs=4")
    best = read_checkpoint(out / "checkpoints/best.pt")
    assert best["step"] == best["best_step"]
    assert (out / "checkpoints" / best["centers"]["folder"]).is_dir()
    expected = losses(out)
    shutil.copy(out / "checkpoints/best.pt", out / LAST)
    run(faces, out, sets, "train.epochs=4")
    assert losses(out) == expected


def test_a_run_killed_before_it_named_the_best_names_it_on_resume(
    faces: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = f'evaluation.sets=["{faces}/pairs.bin"]'

    def killed(*_: Any, best_step: int, step: int, **__: Any) -> None:
        if best_step == step:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "settle", killed)
        with pytest.raises(MemoryError):
            run(faces, tmp_path / "out", sets)
    last = read_checkpoint(tmp_path / "out" / LAST)
    assert last["best_step"] == last["step"] == 5
    assert not (tmp_path / "out/checkpoints/best.pt").exists()
    monkeypatch.setattr(loop, "publish", killed)
    with pytest.raises(MemoryError):
        run(faces, tmp_path / "out", sets)
    assert read_checkpoint(tmp_path / "out/checkpoints/best.pt")["step"] == 5


def test_a_checkpoint_with_flipped_bits_is_not_resumed(faces: Path, tmp_path: Path) -> None:
    out, setting = tmp_path / "out", ("train.epochs=2", "checkpoint.keep=1")
    run(faces, out, *setting)
    expected = losses(out)
    (file,) = last_centers(out).iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    intact = r"beside it, step_000000005\.pt \(step 5\), remove last"
    with pytest.raises(GkdError, match=intact):
        run(faces, out, *setting)
    shutil.rmtree(last_centers(out))
    with pytest.raises(GkdError, match=rf"copy the complete folder of checkpoints, .*{intact}"):
        run(faces, out, *setting)
    (out / LAST).unlink()
    shutil.copy(out / "checkpoints/step_000000005.pt", out / LAST)
    run(faces, out, *setting)
    assert losses(out) == expected


def test_temporary_files_of_a_killed_run_are_deleted(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", "train.epochs=1")
    left = tmp_path / "out/checkpoints/.last.pt.0123456789abcdef0123456789abcdef"
    left.write_bytes(b"half of one")
    run(faces, tmp_path / "out", "train.epochs=1")
    assert not left.exists()


def test_a_damaged_log_is_refused_by_its_line(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", "train.epochs=1")
    with (tmp_path / "out/metrics.jsonl").open("a") as log:
        log.write("junk\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 6: expected a JSON object"):
        run(faces, tmp_path / "out", "train.epochs=1")


def run_with_small_files(size: int, *arguments: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run_process(*arguments)


def test_a_full_disk_is_reported_and_leaves_no_partial_checkpoint(
    faces: Path, tmp_path: Path
) -> None:
    """A process whose files may have 100 kB; a checkpoint has more."""
    with running(run_with_small_files, 100_000, faces, tmp_path / "full") as stopped:
        assert stopped.wait() == 1
    assert "the checkpoint of step 5 could not be written (File too large)" in stopped.err
    assert "no checkpoint was written before" in stopped.err
    assert "run the same command again" in stopped.err
    assert not list((tmp_path / "full/checkpoints").glob("*.pt*"))


def test_a_full_disk_is_reported_once_for_the_log(faces: Path, tmp_path: Path) -> None:
    """A process whose files may have 3000 bytes: what it writes first fits, its log does not."""
    settings = "train.epochs=10", "checkpoint.every_epochs=10"
    with running(run_with_small_files, 3000, faces, tmp_path / "full", *settings) as stopped:
        assert stopped.wait() == 1
    assert "Exception in thread" not in stopped.err
    message = stopped.err.strip().splitlines()[-1]
    assert re.search(r"full/(metrics\.jsonl|tensorboard): the disk or the quota is full", message)


def test_a_killed_data_worker_is_reported(faces: Path, tmp_path: Path) -> None:
    settings = "train.epochs=500", "data.workers=1", "checkpoint.every_epochs=0.2"
    with started(faces, tmp_path / "out", *settings) as process:
        wait_for_step(process, tmp_path / "out", 3)
        for worker in psutil.Process(process.pid).children():
            worker.kill()
        assert process.wait(timeout=30) == 1
    message = process.err.strip().splitlines()[-1]
    # 255: the worker's parent, another child of the run's process, was killed as well.
    dead = (
        r"a process that prepares data died: process \d+ \((SIGKILL|exit code 255)\); often memory"
    )
    assert re.search(dead, message), process.err
    assert "fewer data.workers or provide more memory, and run the same command again" in message
    assert re.search(r"the checkpoint of step \d+ is unchanged", message)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_ends_a_run_after_a_checkpoint(
    faces: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with started(faces, tmp_path / "out", "train.epochs=500", "data.workers=1") as process:
        wait_for_step(process, tmp_path / "out", 3)
        # To all of its group, workers too, as a terminal and a scheduler do.
        os.killpg(process.pid, number)
        assert process.wait(timeout=30) == 1
    step = read_checkpoint(tmp_path / "out" / LAST)["step"]
    message = process.err.strip().splitlines()[-1]
    assert f"stopped by {number.name} after step {step} of 2500" in message
    assert "run the same command again to resume" in message
    assert training_lines(tmp_path / "out")[-1]["step"] == step


def test_a_signal_repeated_at_once_is_one(faces: Path, tmp_path: Path) -> None:
    """As from a scheduler, which signals every process, and torchrun, which hands it on."""
    with started(faces, tmp_path / "out", "train.epochs=500", "data.workers=1") as process:
        wait_for_step(process, tmp_path / "out", 3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
    step = read_checkpoint(tmp_path / "out" / LAST)["step"]
    assert f"stopped by SIGTERM after step {step} of 2500" in process.err


def test_a_run_of_an_older_gkd_resumes(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    """It kept all parameters in one optimizer group, and another name of a key."""
    out, sets = tmp_path / "out", f'evaluation.sets=["{faces}/pairs.bin"]'
    run(faces, out, sets, "checkpoint.keep=3")
    old = read_checkpoint(out / "checkpoints/step_000000005.pt")
    old["config"]["train"]["gradient_hook"] = old["config"]["train"].pop("allreduce_dtype")
    # The configuration decides, whatever else may stand there.
    count = len(old["optimizer"]["state"])
    group = {"params": list(range(count + 1)), "lr": 9.0, "weight_decay": 0.5, "maximize": True}
    old["optimizer"]["param_groups"] = [group]
    write_checkpoint(out / LAST, old)
    run(faces, out, sets)
    assert_same_state(centers_of(out), centers_of(unbroken))
    assert losses(out) == losses(unbroken)


def test_another_configuration_is_not_resumed(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another configuration \(train\.epochs: was 3, now 4\)"):
        run(faces, tmp_path / "out", "train.epochs=4")
    assert load_config(tmp_path / "out/config.toml").train.epochs == 3


def test_another_cache_is_not_resumed(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    records, targets = load(faces)
    targets.store.cache_id = "f" * 64
    with pytest.raises(SpecMismatchError, match=r"cache \(id\): was [0-9a-f]{64}, now f{64}"):
        train(small_config(), records, targets, tmp_path / "out")
