"""Training: what it writes, that any interruption changes nothing, and what it refuses."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from safetensors.torch import load_file

from gkd.storage.errors import ConfigError, CorruptRecordError, GkdError, SpecMismatchError
from gkd.storage.records import open_records
from gkd.storage.rows import Subset
from gkd.storage.spec import preprocess_preset
from gkd.storage.targets import TargetBatch
from gkd.trainer import checkpoint, loop
from gkd.trainer.checkpoint import load_student, read_checkpoint
from gkd.trainer.config import load_config
from gkd.trainer.data import FaceBatches
from gkd.trainer.evaluation import evaluate
from gkd.trainer.findings import read_findings
from gkd.trainer.loading import load_batches
from gkd.trainer.loop import train
from gkd.trainer.losses import GroupTargets
from gkd.trainer.plans import BatchPlan
from gkd.trainer.run_folder import read_described
from gkd.trainer.state import RunState
from tests.paths import ROOT
from tests.reference import log_softmax
from tests.terminal import on_a_terminal
from tests.trainer.faces import SETTINGS, load, run, small_config, teacher_logits

LAST = "checkpoints/last.pt"
SLOW = 0.02  # seconds an image


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
    ends = read_checkpoint(ours / LAST), read_checkpoint(theirs / LAST)
    for end in ends:
        del end["centers"]["sha256"]  # safetensors orders its header as it likes
    assert_same_state(*ends)
    assert_same_state(centers_of(ours), centers_of(theirs))


def centers_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By the file of each rank."""
    return {file.name: load_file(file) for file in sorted(last_centers(out).iterdir())}


def last_centers(out: Path) -> Path:
    folder: str = read_checkpoint(out / LAST)["centers"]["folder"]
    return out / "checkpoints" / folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the runs in processes of their own, which must agree to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 15 steps from start to end."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(faces, out, f'evaluation.sets=["{faces}/pairs.bin"]')
    return out


def test_a_run_leaves_everything_needed_to_judge_and_repeat_it(faces: Path, unbroken: Path) -> None:
    config = load_config(unbroken / "config.toml")
    assert config == small_config(f'evaluation.sets=["{faces}/pairs.bin"]')
    described = json.loads((unbroken / "run.json").read_text())
    assert described["command"] == ["gkd", "test"]
    assert described["dataset"]["num_images"] == 42
    assert len(described["dataset"]["cache_id"]) == 64
    assert described["versions"]["torch"] == torch.__version__
    assert described["parameters"]["head"] == 6 * 8
    teacher = {"name": "none", "arch": "none", "sha256": "0" * 64, "embedding_dim": 8}
    assert described["teacher"] == teacher
    assert json.loads(msgspec.json.encode(read_described(unbroken))) == described
    assert list((unbroken / "tensorboard").iterdir())
    names = {path.name for path in (unbroken / "checkpoints").iterdir()}
    best = read_checkpoint(unbroken / "checkpoints/best.pt")["step"]
    assert names == {"last.pt", "best.pt", "centers_000000015", f"centers_{best:09d}"}


def test_metrics_tell_every_step_and_every_evaluation(unbroken: Path) -> None:
    steps = training_lines(unbroken)
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert steps[0].keys() == {
        "step", "epoch", "loss", "ce", "primary", "binary", "lr", "images_per_second", "data_wait",
        "skipped"
    }  # fmt: skip
    assert steps[4]["epoch"] == 1.0
    assert steps[-1]["lr"] == pytest.approx(2.5e-7)
    assert steps[0]["loss"] == pytest.approx(steps[0]["ce"])  # the ramp begins at 0
    assert all(line["primary"] > 0 for line in steps)
    evaluations = [line for line in lines(unbroken) if "accuracy" in line]
    assert [line["step"] for line in evaluations] == [5, 10, 15]
    best = max(line["accuracy"]["pairs"] for line in evaluations)
    assert read_checkpoint(unbroken / "checkpoints/best.pt")["best"] == best


def test_the_live_line_tells_everything(faces: Path, tmp_path: Path) -> None:
    """On a terminal of 80 columns and as the plain lines of a log."""
    command = [sys.executable, "-m", "tests.trainer.faces", str(faces)]
    parts = {
        "loss": r"\bloss \d+\.\d{3}",
        "CE": r"\bce \d+\.\d{3}",
        "Primary": r"\bprimary \d+\.\d{4}",
        "Binary": r"\bbinary \d+\.\d{4}",
        "lr": r"\blr \d\S*",
        "images a second": r"[\d,.]+ images/s",
        "data wait": r"\bdata wait \d+%",
        "time left of all": r"\bends in \d+:\d\d:\d\d",
    }
    shown = on_a_terminal([*command, str(tmp_path / "a"), "train.epochs=2"], 80)
    last = " ".join(shown[shown.rindex("epoch 2/2") :].split())
    done = subprocess.run(
        [*command, str(tmp_path / "b"), "train.epochs=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("epoch 2/2")]
    for name, part in parts.items():
        assert re.search(part, last), (name, last)
        assert re.search(part, line), (name, line)
    ce = training_lines(tmp_path / "b")[-1]["ce"]
    assert f"ce {ce:.3f}" in line
    assert re.search(r"epoch 2/2 .*images/s \d:\d\d:\d\d \d:\d\d:\d\d", last)  # gone and left


class Slow(Subset):
    """Records of which every image takes a while."""

    def image(self, row: int) -> npt.NDArray[np.uint8]:
        time.sleep(SLOW)
        return super().image(row)


def test_the_log_tells_of_a_slow_loader(faces: Path, tmp_path: Path) -> None:
    """Batches of 8 images, made where they are asked for."""
    records = open_records(faces / "faces")
    config = small_config("kd.enabled=false", "train.epochs=1")
    kinds = {"fast": Subset(records, np.arange(42)), "slow": Slow(records, np.arange(42))}
    told = {}
    for name, kind in kinds.items():
        train(config, kind, None, tmp_path / name)
        told[name] = training_lines(tmp_path / name)
    for line in told["slow"]:
        assert line["data_wait"] * 8 / line["images_per_second"] > 8 * SLOW
    fast, slow = (np.median([line["data_wait"] for line in told[name]]) for name in kinds)
    assert slow > 2 * fast


def test_tensorboard_has_what_the_log_has(unbroken: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    logged_lines = training_lines(unbroken)
    names = logged_lines[0].keys() - {"step"}
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    for name in names:
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        logged = [(line["step"], np.float32(line[name])) for line in logged_lines]
        assert seen == logged


def test_the_student_of_a_run_loads(unbroken: Path) -> None:
    student = load_student(unbroken / LAST)
    with torch.no_grad():
        assert student.backbone(torch.zeros(1, 3, 112, 112)).shape == (1, 8)


@pytest.mark.parametrize("last", ["false", "true"])
def test_a_student_sees_images_as_the_preset_says(faces: Path, last: str) -> None:
    """To the bit, as ``gkd evaluate`` shows them to it."""
    records, targets = load(faces)
    state = RunState.build(small_config(f"train.channels_last={last}"), records, targets)
    batches = load_batches(
        FaceBatches(records, targets, temperature=4.0), state.plans, workers=0, pin=False
    )
    seen: list[torch.Tensor] = []
    state.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    batch = next(batches)
    state.take_step(batch, records)
    expected = preprocess_preset("arcface").apply(batch.images.numpy())
    np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_training_fits_the_data(faces: Path, tmp_path: Path) -> None:
    """Cross-entropy and both divergences fall far below where they began."""
    run(
        faces,
        tmp_path / "out",
        "train.epochs=40",
        "optimizer.lr=0.02",
        "head.scale=16",
        "head.margin=0.1",
        "kd.ramp=0",
        "schedule.warmup_epochs=4",
    )
    steps = training_lines(tmp_path / "out")
    for name in ("ce", "primary", "binary"):
        first, last = (sum(line[name] for line in part) for part in (steps[:10], steps[-10:]))
        assert last < first * 0.6, name


def test_finishing_again_changes_nothing(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    summary = run(faces, tmp_path / "out", f'evaluation.sets=["{faces}/pairs.bin"]')
    assert summary.steps == 15
    assert summary.accuracy.keys() == {"pairs"}
    assert (tmp_path / "out" / LAST).read_bytes() == (unbroken / LAST).read_bytes()
    assert lines(tmp_path / "out") == lines(unbroken)


@contextmanager
def started(faces: Path, out: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """A training in a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "tests.trainer.faces", str(faces), str(out), *overrides]
    with (
        (out.parent / "words").open("w+") as words,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(lines_so_far(out)) >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"no step {step}: {(out.parent / 'words').read_text()}")


def lines_so_far(out: Path) -> list[bytes]:
    return (out / "metrics.jsonl").read_bytes().splitlines()


@pytest.mark.parametrize("more", [(), ("head.sample_rate=0.4",)])
def test_killed_and_resumed_it_ends_in_the_same_bits(
    faces: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """kill -9 at random steps, each time the same command again; two workers."""
    overrides = ("train.epochs=8", "checkpoint.every_epochs=0.4", "data.workers=2", *more)
    run(faces, tmp_path / "whole", *overrides)
    out = tmp_path / "killed"
    dice = random.Random(4)
    for target in (dice.randint(3, 15), dice.randint(20, 32)):
        with started(faces, out, *overrides) as process:
            wait_for_step(process, out, target)
        assert process.returncode == -signal.SIGKILL
    assert read_checkpoint(out / LAST)["step"] < 40
    run(faces, out, *overrides)
    assert_same_end(out, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("at", [4, 7])
def test_lines_over_many_steps_do_not_tell_of_an_interruption(
    faces: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Means over the steps up to a multiple of 3 or an epoch's end."""
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
def test_cut_off_in_an_evaluation_it_goes_on_with_the_evaluation(
    faces: Path, tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    """At the end of an epoch in between, and at the last: the steps before are not lost."""
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
    told = [[x for x in lines(out) if "accuracy" in x] for out in (tmp_path / "out", unbroken)]
    assert told[0] == told[1]
    fits = [read_findings(out) for out in (tmp_path / "out", unbroken)]
    assert fits[0] == fits[1]


def test_the_best_checkpoint_can_be_gone_on_with(faces: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "out", f'evaluation.sets=["{faces}/pairs.bin"]'
    run(faces, out, sets, "train.epochs=4")
    best = read_checkpoint(out / "checkpoints/best.pt")
    assert best["step"] == best["best_step"]
    assert (out / "checkpoints" / best["centers"]["folder"]).is_dir()
    whole = losses(out)
    shutil.copy(out / "checkpoints/best.pt", out / LAST)
    run(faces, out, sets, "train.epochs=4")
    assert losses(out) == whole


def test_killed_before_it_named_the_best_it_is_named_on_resume(
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


def test_bits_that_flipped_in_a_checkpoint_are_not_gone_on_with(
    faces: Path, tmp_path: Path
) -> None:
    out, setting = tmp_path / "out", ("train.epochs=2", "checkpoint.keep=1")
    run(faces, out, *setting)
    whole = losses(out)
    (file,) = last_centers(out).iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(GkdError, match=r"beside it, step_000000005\.pt \(step 5\), remove last"):
        run(faces, out, *setting)
    (out / LAST).unlink()
    shutil.copy(out / "checkpoints/step_000000005.pt", out / LAST)
    run(faces, out, *setting)
    assert losses(out) == whole


def test_what_a_kill_left_of_a_checkpoint_is_cleared_away(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", "train.epochs=1")
    left = tmp_path / "out/checkpoints/.last.pt.0123456789abcdef0123456789abcdef"
    left.write_bytes(b"half of one")
    run(faces, tmp_path / "out", "train.epochs=1")
    assert not left.exists()


def test_a_log_that_is_none_is_refused_by_its_line(faces: Path, tmp_path: Path) -> None:
    run(faces, tmp_path / "out", "train.epochs=1")
    with (tmp_path / "out/metrics.jsonl").open("a") as log:
        log.write("junk\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 6: expected a JSON object"):
        run(faces, tmp_path / "out", "train.epochs=1")


def test_a_disk_that_takes_no_checkpoint_is_told_and_no_half_of_one_stays(
    faces: Path, tmp_path: Path
) -> None:
    """A process whose files may have 100 kB; a checkpoint has more."""
    stopped = subprocess.run(
        [sys.executable, "-m", "tests.trainer.faces", faces, tmp_path / "full"],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == 1
    assert "the checkpoint of step 5 could not be written (File too large)" in stopped.stderr
    assert "no checkpoint was written before" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    assert not list((tmp_path / "full/checkpoints").glob("*.pt*"))


def test_a_full_disk_under_the_log_is_told_in_one_message(faces: Path, tmp_path: Path) -> None:
    """A process whose files may have 3000 bytes: what it writes first fits, its log does not."""
    command = [sys.executable, "-m", "tests.trainer.faces", str(faces), str(tmp_path / "full")]
    stopped = subprocess.run(
        [*command, "train.epochs=10", "checkpoint.every_epochs=10"],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == 1
    assert "Exception in thread" not in stopped.stderr
    told = stopped.stderr.strip().splitlines()[-1]
    assert re.search(r"full/(metrics\.jsonl|tensorboard): the disk has no room for it", told)


def test_a_data_worker_that_is_killed_is_told(faces: Path, tmp_path: Path) -> None:
    settings = "train.epochs=500", "data.workers=1", "checkpoint.every_epochs=0.2"
    with started(faces, tmp_path / "out", *settings) as process:
        wait_for_step(process, tmp_path / "out", 3)
        for worker in psutil.Process(process.pid).children():
            worker.kill()
        assert process.wait(timeout=30) == 1
    told = (tmp_path / "words").read_text().strip().splitlines()[-1]
    # Cut off while it hands a batch over, a worker leaves torch no word of its own.
    assert re.search(
        r"a process that prepares data died \((DataLoader worker|.*reset by peer)", told
    )
    assert "fewer data.workers or give more memory, and run the same command again; the c" in told
    assert re.search(r"the checkpoint of step \d+ stands as it was", told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint_and_words(
    faces: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with started(faces, tmp_path / "out", "train.epochs=500", "data.workers=1") as process:
        wait_for_step(process, tmp_path / "out", 3)
        # To all of its group, workers too, as a terminal and a scheduler do.
        os.killpg(process.pid, number)
        assert process.wait(timeout=30) == 1
    words = (tmp_path / "words").read_text()
    step = read_checkpoint(tmp_path / "out" / LAST)["step"]
    message = words.strip().splitlines()[-1]
    assert f"stopped by {number.name} after step {step} of 2500" in message
    assert "run the same command again to go on" in message
    assert training_lines(tmp_path / "out")[-1]["step"] == step


def test_a_signal_that_comes_twice_at_once_is_one(faces: Path, tmp_path: Path) -> None:
    """As from a scheduler, which signals every process, and torchrun, which hands it on."""
    with started(faces, tmp_path / "out", "train.epochs=500", "data.workers=1") as process:
        wait_for_step(process, tmp_path / "out", 3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
    step = read_checkpoint(tmp_path / "out" / LAST)["step"]
    assert f"stopped by SIGTERM after step {step} of 2500" in (tmp_path / "words").read_text()


class OnlineTeacher(FaceBatches):
    """Targets from the teacher's dense logits at each step, exact, sorted densely, no cache."""

    def _targets(self, plan: BatchPlan) -> GroupTargets:
        views = (teacher_logits(self.records, "original"), teacher_logits(self.records, "flipped"))
        classes, log_probs, rest = [], [], []
        for row, flipped in zip(plan.rows, plan.flipped, strict=True):
            logits = views[int(flipped)][row].astype(np.float64)
            order = np.argsort(-logits, kind="stable")
            mass = np.exp(log_softmax(logits / SETTINGS.group_temperature))[order].cumsum()
            group = order[: np.searchsorted(mass, SETTINGS.threshold) + 1]
            group = np.union1d(group, [self.records.labels[row]])
            log_p = log_softmax(logits / self.temperature)
            classes.append(group)
            log_probs.append(log_p[group])
            rest.append(np.log(np.delete(np.exp(log_p), group).sum() or 1e-300))
        sizes = [len(group) for group in classes]
        return GroupTargets.from_batch(
            TargetBatch(
                np.concatenate([[0], np.cumsum(sizes)]),
                np.concatenate(classes),
                np.concatenate(log_probs).astype(np.float32),
                np.array(rest, np.float32),
            )
        )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_cache_teaches_what_the_teacher_would(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The same losses step by step, to 1e-3, as with the dense teacher asked at each step."""
    # A small rate: a large one amplifies any difference, the last bit of a sum included.
    overrides = ("optimizer.lr=3e-4", "kd.ramp=0", f"kd.temperature={temperature}")
    run(faces, tmp_path / "cached", *overrides)
    monkeypatch.setattr(loop, "FaceBatches", OnlineTeacher)
    run(faces, tmp_path / "online", *overrides)
    cached, online = np.array(losses(tmp_path / "cached")), np.array(losses(tmp_path / "online"))
    assert len(cached) == 15
    np.testing.assert_allclose(cached, online, rtol=1e-3)
    assert not np.array_equal(cached, online)


def test_without_distillation_targets_are_not_needed(faces: Path, tmp_path: Path) -> None:
    records = open_records(faces / "faces")
    config = small_config("kd.enabled=false", "train.epochs=1")
    assert train(config, records, None, tmp_path / "out").steps == 5
    assert {line["primary"] for line in training_lines(tmp_path / "out")} == {0.0}
    described = json.loads((tmp_path / "out/run.json").read_text())
    assert described["dataset"]["cache_id"] == ""


def test_distillation_without_targets_is_refused(faces: Path, tmp_path: Path) -> None:
    records = open_records(faces / "faces")
    with pytest.raises(ConfigError, match=r"kd\.enabled: no targets were given; .*--without-kd"):
        train(small_config(), records, None, tmp_path / "out")


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.kind=adamw", "optimizer.lr=0.001", "schedule.kind=poly"),
        ("head.kind=arcface", "schedule.kind=step", "optimizer.clip_norm=0"),
        ("train.precision=bfloat16", "train.channels_last=false"),
        ("student.name=mobilefacenet", "student.width=0.25", "data.flip=false"),
    ],
)
def test_other_settings_train(faces: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert run(faces, tmp_path / "out", "train.epochs=1", *overrides).steps == 5
    assert np.isfinite(losses(tmp_path / "out")).all()


def test_gradients_of_the_backbone_are_clipped(faces: Path) -> None:
    records, targets = load(faces)
    config = small_config("optimizer.clip_norm=0.25", "train.epochs=1")
    state = RunState.build(config, records, targets)
    batches = load_batches(
        FaceBatches(records, targets, temperature=4.0), state.plans, workers=0, pin=False
    )
    state.take_step(next(batches), records)
    squares = [
        sum(
            float(p.grad.double().square().sum()) for p in module.parameters() if p.grad is not None
        )
        for module in (state.model, state.head)
    ]
    assert np.sqrt(squares[0]) == pytest.approx(0.25, rel=1e-4)
    assert np.sqrt(squares[1]) > 0.25  # class centres are not clipped


def test_a_corrupt_image_ends_the_training_by_name(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces / "faces", tmp_path / "faces")
    for path in (tmp_path / "faces").rglob("*.jpg"):
        path.write_bytes(b"\xff\xd8 no face")
    config = small_config("kd.enabled=false", "data.workers=2")
    with pytest.raises(CorruptRecordError, match=r"person_\d.*\.jpg"):
        train(config, open_records(tmp_path / "faces"), None, tmp_path / "out")


def test_another_configuration_does_not_go_on(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another configuration \(train\.epochs: 3, now 4\)"):
        run(faces, tmp_path / "out", "train.epochs=4")
    assert load_config(tmp_path / "out/config.toml").train.epochs == 3


def test_another_cache_does_not_go_on(faces: Path, tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    records, targets = load(faces)
    targets.store.cache_id = "f" * 64
    with pytest.raises(SpecMismatchError, match=r"cache \(id\): [0-9a-f]{64}, now f{64}"):
        train(small_config(), records, targets, tmp_path / "out")


def test_targets_of_other_records_are_refused(faces: Path, tmp_path: Path) -> None:
    records, targets = load(faces)
    fewer = replace(targets, rows=targets.rows[:-1])
    with pytest.raises(SpecMismatchError, match=r"42 images of 6 classes, .* 41 images of 6"):
        train(small_config(), records, fewer, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"got one that holds thesis\.tex; name another folder"):
        run(faces, tmp_path)
    with pytest.raises(ConfigError, match="expected a folder to train into, got a file"):
        run(faces, tmp_path / "thesis.tex")


def test_two_trainings_do_not_share_a_folder(faces: Path, tmp_path: Path) -> None:
    with started(faces, tmp_path / "out", "train.epochs=500") as process:
        wait_for_step(process, tmp_path / "out", 1)
        with pytest.raises(ConfigError, match="another process is training into this folder"):
            run(faces, tmp_path / "out", "train.epochs=500")


def test_sets_of_one_name_are_refused(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.bin").write_bytes((faces / "pairs.bin").read_bytes())
    sets = json.dumps([f"{faces}/pairs.bin", f"{tmp_path}/pairs.bin"])
    with pytest.raises(ConfigError, match=r"evaluation\.sets: 2 files are named pairs"):
        run(faces, tmp_path / "out", f"evaluation.sets={sets}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.device=cuda", r"train\.device: torch finds no GPU; set train\.device=cpu"),
        ("train.precision=float16", r"train\.precision: float16 needs a GPU"),
    ],
)
def test_what_needs_a_gpu_says_so(faces: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(faces, tmp_path / "out", override)


def test_without_tensorboard_it_is_said_and_trains(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run(faces, tmp_path / "out", "train.epochs=1")
    assert capsys.readouterr().err.count("pip install '.[tensorboard]'") == 1
    assert not (tmp_path / "out/tensorboard").exists()
