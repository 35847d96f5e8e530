"""Training: its files, what it learns and what it refuses."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.cache.targets import TargetBatch
from gkd.storage.errors import ConfigError, CorruptRecordError, SpecMismatchError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from gkd.trainer import loop
from gkd.trainer.checkpoint import load_student, read_checkpoint
from gkd.trainer.config_file import load_config
from gkd.trainer.data.dataset import FaceBatches
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.data.sampler import BatchIndices
from gkd.trainer.head.loss import GkdLoss
from gkd.trainer.head.targets import GroupTargets
from gkd.trainer.logging import Window
from gkd.trainer.loop import describe_window, train
from gkd.trainer.run_dir import read_run_info
from gkd.trainer.state import RunState
from tests.reference import log_softmax
from tests.terminal import on_a_terminal
from tests.trainer.faces import SETTINGS, load, run, run_process, small_config, teacher_logits
from tests.trainer.runs import LAST, lines, losses, started, training_lines, wait_for_step

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW = 0.02  # seconds per image


def test_a_run_folder_has_what_is_needed_to_repeat_the_run(faces: Path, unbroken: Path) -> None:
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
    assert json.loads(msgspec.json.encode(read_run_info(unbroken))) == described
    assert list((unbroken / "tensorboard").iterdir())
    names = {path.name for path in (unbroken / "checkpoints").iterdir()}
    best = read_checkpoint(unbroken / "checkpoints/best.pt")["step"]
    assert names == {"last.pt", "best.pt", "centers_000000015", f"centers_{best:09d}"}


def test_metrics_have_every_step_and_every_evaluation(unbroken: Path) -> None:
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


def test_the_live_line_tells_everything(
    faces: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a terminal of 80 columns and as the plain lines of a log."""
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
    shown = on_a_terminal(80, run_process, faces, tmp_path / "a", "train.epochs=2")
    last = " ".join(shown[shown.rindex("epoch 2/2") :].split())
    run(faces, tmp_path / "b", "train.epochs=2")
    printed = capfd.readouterr().err.splitlines()
    (line,) = [line for line in printed if line.startswith("epoch 2/2")]
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


def test_the_log_shows_the_wait_for_a_slow_loader(faces: Path, tmp_path: Path) -> None:
    """Batches of 8 images, decoded in the training's own process."""
    records = Slow(open_records(faces / "faces"), np.arange(42))
    train(small_config("kd.enabled=false", "train.epochs=1"), records, None, tmp_path / "out")
    for line in training_lines(tmp_path / "out"):
        assert line["data_wait"] * 8 / line["images_per_second"] > 8 * SLOW
        assert line["data_wait"] < 1  # the step takes time too


def test_data_wait_is_a_share_of_the_time() -> None:
    """Three steps of 4 s, of which 3, 2 and 1 s were spent waiting for 8 images."""
    window = Window()
    for waited in (3.0, 2.0, 1.0):
        window.add(GkdLoss(*torch.ones(4)), seconds=4.0, waited=waited, skipped=False)
    means = window.means(8)
    assert means["data_wait"] == 0.5
    assert means["images_per_second"] == 2.0
    assert "data wait 50%" in describe_window(means, lr=0.1, skipped=0, seconds_left=5)


def test_losses_that_are_always_0_are_not_shown() -> None:
    window = Window()
    window.add(GkdLoss(*torch.tensor([2.0, 1.0, 0.25, 0.0])), seconds=1, waited=0, skipped=False)
    words = describe_window(window.means(8), lr=0.1, skipped=0, seconds_left=3)
    assert words == "loss 2.000  ce 1.000  primary 0.2500  lr 0.1  data wait 0%  ends in 0:00:03"


def test_tensorboard_has_the_values_of_the_log(unbroken: Path) -> None:
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
def test_a_student_gets_images_preprocessed_by_the_preset(faces: Path, last: str) -> None:
    """Bit for bit as in ``gkd evaluate``."""
    records, targets = load(faces)
    state = RunState(small_config(f"train.channels_last={last}"), records, targets)
    batches = BatchLoader(
        FaceBatches(records, targets, temperature=4.0), state.sampler, workers=0, pin=False
    )
    seen: list[torch.Tensor] = []
    state.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    batch = next(batches)
    state.take_step(batch, records)
    expected = preprocess_preset("arcface").apply(batch.images.numpy())
    np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_training_fits_the_data(faces: Path, tmp_path: Path) -> None:
    """Cross-entropy and both divergences fall far below their first values."""
    run(
        faces,
        tmp_path / "out",
        "train.epochs=40",
        "checkpoint.every_epochs=40",
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


class OnlineTeacher(FaceBatches):
    """Exact targets from the teacher's dense logits in each step, without a cache."""

    def _targets(self, indices: BatchIndices) -> GroupTargets:
        views = (teacher_logits(self.records, "original"), teacher_logits(self.records, "flipped"))
        classes, log_probs, rest = [], [], []
        for row, flipped in zip(indices.rows, indices.flipped, strict=True):
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
def test_training_from_the_cache_is_training_with_the_teacher(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The losses of each step agree to 1e-3 with those of the dense teacher."""
    # A large learning rate would amplify any difference, even the last bit of a sum.
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
    state = RunState(config, records, targets)
    batches = BatchLoader(
        FaceBatches(records, targets, temperature=4.0), state.sampler, workers=0, pin=False
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


def test_a_corrupt_image_ends_the_training_with_its_name(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces / "faces", tmp_path / "faces")
    for path in (tmp_path / "faces").rglob("*.jpg"):
        path.write_bytes(b"\xff\xd8 no face")
    config = small_config("kd.enabled=false", "data.workers=2")
    with pytest.raises(CorruptRecordError, match=r"person_\d.*\.jpg"):
        train(config, open_records(tmp_path / "faces"), None, tmp_path / "out")


def test_targets_of_other_records_are_refused(faces: Path, tmp_path: Path) -> None:
    records, targets = load(faces)
    fewer = replace(targets, rows=targets.rows[:-1])
    with pytest.raises(SpecMismatchError, match=r"42 images of 6 classes, .* 41 images of 6"):
        train(small_config(), records, fewer, tmp_path / "out")


def test_a_folder_with_other_files_is_refused(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"got one that holds thesis\.tex; name another folder"):
        run(faces, tmp_path)
    with pytest.raises(ConfigError, match="expected a folder to train into, got a file"):
        run(faces, tmp_path / "thesis.tex")


def test_two_trainings_cannot_share_a_folder(faces: Path, tmp_path: Path) -> None:
    with started(faces, tmp_path / "out", "train.epochs=500") as process:
        wait_for_step(process, tmp_path / "out", 1)
        with pytest.raises(ConfigError, match=r"out: another run is writing it: process \d+ on "):
            run(faces, tmp_path / "out", "train.epochs=500")


def test_sets_with_equal_names_are_refused(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.bin").write_bytes((faces / "pairs.bin").read_bytes())
    sets = json.dumps([f"{faces}/pairs.bin", f"{tmp_path}/pairs.bin"])
    with pytest.raises(ConfigError, match=r"evaluation\.sets: 2 files are named pairs"):
        run(faces, tmp_path / "out", f"evaluation.sets={sets}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.device=cuda",
            r"train\.device: expected auto, cpu or .*'cuda'.*; use auto or cpu",
        ),
        ("train.precision=float16", r"train\.precision: float16 needs a GPU"),
    ],
)
def test_settings_that_need_a_gpu_are_refused_without(
    faces: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(faces, tmp_path / "out", override)
