"""What training refuses, skips and stops at: each fault is provoked, none is simulated."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.open import open_records
from gkd.storage.util.files import sha256_file
from gkd.trainer.checkpoint import publish, read_checkpoint, write_checkpoint
from gkd.trainer.data.dataset import Batch, FaceBatches
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.distributed import ALONE
from gkd.trainer.guards import AS_MANY, DIVERGED, LONG, MEMORY, Divergence, finite_weights
from gkd.trainer.head.loss import GkdLoss
from gkd.trainer.head.margin import Margin
from gkd.trainer.loop import train
from gkd.trainer.state import RunState
from tests.trainer.faces import load, run, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


def start(faces: Path, *overrides: str) -> tuple[RunState, Iterator[Batch]]:
    records, targets = load(faces)
    config = small_config(*overrides)
    state = RunState(config, records, targets)
    dataset = FaceBatches(records, targets, temperature=config.kd.temperature)
    return state, BatchLoader(dataset, state.sampler, workers=0, pin=False)


def learned(state: RunState) -> dict[str, torch.Tensor]:
    """Copies of everything that a step changes in the networks and the optimizer."""
    content = {**state.model.state_dict(), **state.head.state_dict(prefix="head.")}
    for number, kept in state.optimizer.state_dict()["state"].items():
        content |= {f"{number}.{name}": value for name, value in kept.items()}
    return copy.deepcopy(content)


def spoil(gradient: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(gradient.numel()).view_as(gradient) == 3, torch.nan, gradient)


@pytest.mark.parametrize("clip", ["0", "5"])
@pytest.mark.parametrize("part", ["model", "head"])
def test_a_gradient_that_is_not_finite_changes_nothing(faces: Path, part: str, clip: str) -> None:
    state, batches = start(faces, f"optimizer.clip_norm={clip}")
    records = open_records(faces / "faces")
    state.take_step(next(batches), records)
    before, rate = learned(state), state.lr
    parameter = next(getattr(state, part).parameters())
    hook = parameter.register_hook(spoil)
    batch = next(batches)
    state.take_step(batch, records)
    hook.remove()
    after = learned(state)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (state.step, state.skipped, state.skipped_in_a_row) == (2, 1, 1)
    assert state.lr > rate  # warm-up continues
    assert state.last_skipped is not None
    assert np.isnan(state.last_skipped.parts["gradient_norm"])
    assert np.isfinite(state.last_skipped.parts["total"])
    assert state.last_skipped.records == tuple(records.key(row) for row in batch.rows.tolist())
    state.take_step(next(batches), records)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 0)
    assert not torch.equal(before["head.weight"], learned(state)["head.weight"])


def test_a_loss_that_is_not_finite_leaves_running_statistics_unchanged(faces: Path) -> None:
    state, batches = start(faces)
    records = open_records(faces / "faces")
    state.take_step(next(batches), records)
    before = learned(state)
    hook = next(iter(state.model.children())).register_forward_hook(lambda *_: _[2] * torch.nan)
    state.take_step(next(batches), records)
    hook.remove()
    after = learned(state)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert finite_weights((state.model, state.head))


def test_a_gradient_scaler_finds_its_scale(faces: Path) -> None:
    """At the first scales the loss overflows: steps are skipped and the scale halved, until not."""
    state, batches = start(faces, "optimizer.clip_norm=5", "train.max_skipped=40")
    records = open_records(faces / "faces")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125)
    before = learned(state)
    scales: list[float] = []
    while not scales or state.skipped_in_a_row:
        scales.append(state.scaler.get_scale())
        state.take_step(next(batches), records)
    assert scales == [2.0**125 / 2**n for n in range(len(scales))]
    assert state.skipped == len(scales) - 1 > 0
    assert not torch.equal(before["head.weight"], learned(state)["head.weight"])
    assert finite_weights((state.model, state.head))


@contextmanager
def fault_at(step: int, cause: Callable[[RunState], object]) -> Iterator[None]:
    """Call ``cause`` on the state of a run before it takes the step after ``step``."""
    take_step = RunState.take_step

    def faulty(state: RunState, batch: Batch, records: Records) -> GkdLoss:
        if state.step == step:
            cause(state)
        return take_step(state, batch, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "take_step", faulty)
        yield


# A checkpoint after every step; weights change so little that each step's loss is about the first.
CALM = ("optimizer.lr=1e-6", "train.epochs=9", "checkpoint.every_epochs=0.2")


def test_after_max_skipped_steps_in_a_row_it_stops(faces: Path, tmp_path: Path) -> None:
    """The log names each skipped step and its records, and no checkpoint is damaged."""
    out = tmp_path / "out"
    spoiled = fault_at(5, lambda state: state.head.weight.register_hook(spoil))
    with spoiled, pytest.raises(GkdError) as error:
        run(faces, out, *CALM, "train.max_skipped=4", "train.log_every=2")
    message = str(error.value)
    assert "were not finite in 4 steps in a row (train.max_skipped)" in message
    assert "the last was step 9 (" in message
    assert "gradient_norm nan) with records person_" in message
    assert "lower optimizer.lr or more schedule.warmup_epochs" in message
    assert message.count(".jpg") == 8
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "not_finite" in line]
    assert [line["step"] for line in skipped] == [6, 7, 8, 9]
    assert [len(line["records"]) for line in skipped] == [8] * 4
    assert skipped[-1]["not_finite"]["gradient_norm"] == "nan"
    kept = read_checkpoint(out / "checkpoints/last.pt")
    assert kept["step"] == 8
    assert "the checkpoint of step 8 is unchanged" in message
    assert all(torch.isfinite(value).all() for value in kept["model"].values())


def test_weights_that_are_not_finite_are_not_saved(faces: Path, tmp_path: Path) -> None:
    def overflow(state: RunState) -> None:
        state.head.weight.data[1, 2] = torch.inf

    message = r"after step 4 the weights are not finite, so no checkpoint of them .* of step 3 is"
    with fault_at(3, overflow), pytest.raises(GkdError, match=message):
        run(faces, tmp_path / "out", *CALM)
    assert read_checkpoint(tmp_path / "out/checkpoints/last.pt")["step"] == 3


def test_a_loss_far_above_its_beginning_is_called_divergence(faces: Path, tmp_path: Path) -> None:
    """A margin of 3 from the second step on raises every cross-entropy by 2.6 * 64."""

    def raise_margin(state: RunState) -> None:
        state.head_spec = replace(state.head_spec, margin=Margin(m3=3.0))

    with fault_at(1, raise_margin), pytest.raises(GkdError) as error:
        run(faces, tmp_path / "out", *CALM)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    entropies = [json.loads(line)["ce"] for line in lines]
    expected = Divergence()
    for ce in entropies:
        assert not expected.found
        expected.add(ce, settled=True)
    assert not expected.found
    message = str(error.value)
    assert f"the training diverges: at step {len(entropies) + 1} of 45" in message
    assert f"it began at {entropies[0]:.4g};" in message
    mean = float(message.partition("cross-entropy is ")[2].partition(",")[0])
    assert DIVERGED * entropies[0] < mean < expected.mean + max(entropies) / MEMORY
    assert "the highest learning rate so far was 1e-06" in message
    assert "lower optimizer.lr or more schedule.warmup_epochs" in message


def test_a_short_peak_is_no_divergence() -> None:
    watch = Divergence()
    for ce in [40.0, *([100.0] * 20), *([35.0] * 500)]:
        watch.add(ce, settled=False)
        assert not watch.found
    # From 35 the mean after n steps at 90 is 90 - 55 * 0.98^n, above 60 from n = 31 on.
    steps = 0
    while not watch.found:
        watch.add(90.0, settled=False)
        steps += 1
    assert steps == 31


def test_a_loss_that_stays_above_its_beginning_is_a_divergence() -> None:
    """Cosines bound the cross-entropy of a failed run; a warm-up may raise it for a while."""
    watch = Divergence()
    for _ in range(1000):
        watch.add(45.0 if watch.first is None else 55.0, settled=False)
        assert not watch.found
    slowly = copy.deepcopy(watch)
    for _ in range(LONG // AS_MANY):
        assert not watch.found
        watch.add(55.0, settled=True)
    assert watch.found
    slowly.mean = 46.0
    for _ in range(LONG):
        assert not slowly.found
        slowly.add(46.0, settled=True)
    assert slowly.found
    for ce in [30.0] * 200:
        watch.add(ce, settled=True)
    assert not watch.found


# Cross-entropies of real trainings without a warm-up, at rates of 1000, 100, 0.1 and 1.
WILD = [45.8, 36.7, 76.3, 50.8, 84.5, 47.8, 58.4, 59.2, 66.7, 53.8, 73.1, 46.8, 73.8, 70.6, 87.4]
WILDER = [45.8, 37.8, 92.7, 76.0, 94.4, 85.3, 87.4, 79.2, 82.2, 65.4, 79.5, 67.8, 72.3, 47.0, 43.8]
HEALTHY = [45.8, 73.4, 64.0, 42.3, 60.0, 42.0, 55.3, 36.1, 27.2, 18.4, 19.6, 9.5, 21.7, 17.0, 24.4]
SLOW = [45.8, 66.9, 71.7, 68.8, 78.9, 37.7, 34.4, 51.3, 54.8, 35.0, 32.0, 31.8, 27.9, 31.5, 31.4]


@pytest.mark.parametrize("lost", [WILD, WILDER])
def test_a_rate_that_diverges_is_named_within_fifty_steps(lost: list[float]) -> None:
    watch = Divergence()
    for ce in [*lost, *lost[1:] * 3][:50]:
        watch.add(ce, settled=True)
    assert watch.found


@pytest.mark.parametrize("found", [HEALTHY, SLOW])
def test_a_wild_beginning_is_no_divergence(found: list[float]) -> None:
    watch = Divergence()
    for ce in [*found, *found[8:] * 20]:
        watch.add(ce, settled=True)
        assert not watch.found


def test_counts_survive_an_interruption(faces: Path, tmp_path: Path) -> None:
    state, batches = start(faces)
    records, targets = load(faces)
    state.head.weight.register_hook(spoil)
    for _ in range(3):
        state.take_step(next(batches), records)
    again = RunState(state.config, records, targets)
    publish(tmp_path, state.state(), state.centers(), ALONE, step=3, best_step=-1, keep=0)
    again.restore(read_checkpoint(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert (again.step, again.skipped, again.skipped_in_a_row) == (3, 3, 3)
    assert again.divergence == state.divergence


def test_weights_of_another_embedding_size_are_refused(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(faces, out, "train.epochs=1")
    (file,) = (out / "checkpoints").glob("centers_*/*.safetensors")
    last = out / "checkpoints/last.pt"
    state = read_checkpoint(last)
    wrong = load_file(file) | {"weight": torch.zeros(6, 16)}
    save_file(wrong, file, metadata=metadata_of(file))
    state["centers"]["sha256"][file.name] = sha256_file(file)
    write_checkpoint(last, state)
    with pytest.raises(ConfigError, match=r"centers_000000005: expected the class centres"):
        run(faces, out, "train.epochs=1")


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        metadata: dict[str, str] = opened.metadata()
    return metadata


def test_labels_outside_the_classes_are_refused(faces: Path, tmp_path: Path) -> None:
    records = open_records(faces / "faces")
    config = small_config("kd.enabled=false")
    with pytest.raises(
        ConfigError,
        match=r"14 records of .* no label among its 4 classes, the first: 4 of .*person_4/0.jpg",
    ):
        train(config, Subset(records, np.arange(42), 4), None, tmp_path / "out")
    records.labels[5] = -1
    with pytest.raises(
        ConfigError, match=r"1 records of .* have no label among its 6 classes, the first: -1 of"
    ):
        train(config, records, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_identity_is_refused(faces: Path, tmp_path: Path) -> None:
    records = Subset(open_records(faces / "faces"), np.repeat(np.arange(7, 14), 2))
    with pytest.raises(ConfigError, match=r"at least two identities, got only class 1"):
        train(small_config("kd.enabled=false"), records, None, tmp_path / "out")


def test_classes_without_an_image_are_refused_unless_kept(faces: Path, tmp_path: Path) -> None:
    records = Subset(open_records(faces / "faces"), np.arange(7, 42), 9)
    settings = ("kd.enabled=false", "train.epochs=1")
    message = r"faces: 4 of 9 classes have no image \(0, 6, 7, 8\); .* set data.empty_classes=keep"
    with pytest.raises(ConfigError, match=message):
        train(small_config(*settings), records, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    huge = Subset(records, np.arange(35), 2**40)
    with pytest.raises(ConfigError, match=r"of 1,099,511,627,776 classes have no image \(0, 6, 7"):
        train(small_config(*settings), huge, None, tmp_path / "out")
    kept = small_config(*settings, "data.empty_classes=keep")
    assert train(kept, records, None, tmp_path / "out").steps == 4
