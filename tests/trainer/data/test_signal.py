"""What a training uses of a cache with drawn classes: its groups, the draws, or both."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.trainer.config import Signal
from gkd.trainer.data.dataset import FaceBatches, JoinedTargets, join_targets
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.data.sampler import BatchSampler
from gkd.trainer.loop import train
from tests.reference import log_softmax
from tests.trainer.data.test_dataset import assert_same_batches
from tests.trainer.faces import load, small_config, teacher_logits, write_cache
from tests.trainer.runs import losses

DRAWS = DrawsSpec(3, 4.0, "all")


@pytest.fixture(scope="module")
def drawn(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, JoinedTargets]:
    folder = tmp_path_factory.mktemp("drawn")
    records = open_records(faces / "faces")
    write_cache(folder / "targets.gkd", records, ["original", "flipped"], DRAWS)
    cache = Cache.open(folder / "targets.gkd")
    return join_targets(records, cache, workers=1, folder=folder / "materialised")


@pytest.mark.parametrize(
    "signal",
    ["draws", *(pytest.param(signal, marks=pytest.mark.nightly) for signal in ("hybrid", "group"))],
)
def test_each_signal_teaches(
    drawn: tuple[Records, JoinedTargets], tmp_path: Path, signal: Signal
) -> None:
    settings = "train.epochs=30", "kd.ramp=0", "optimizer.lr=0.02", "head.scale=16", "head.margin=0"
    config = small_config(*settings, f"kd.signal={signal}", "checkpoint.every_epochs=30")
    train(config, *drawn, tmp_path / "run")
    steps = losses(tmp_path / "run")
    first, last = (np.mean([line[3] for line in part]) for part in (steps[:10], steps[-10:]))
    assert last < first * 0.7
    binary = {line[4] for line in steps}
    assert (binary == {0.0}) == (
        signal != "group"
    )  # with draws from all classes, no class is outside


def test_draws_give_the_distribution_of_their_counts(
    drawn: tuple[Records, JoinedTargets],
) -> None:
    """r_j p_j of the entries: draws c_j / n; hybrid the stored ones and the mass of the rest."""
    records, targets = drawn
    indices = next(iter(BatchSampler(42, 8, 1, 0, flip=True)))
    logits = [teacher_logits(records, view) for view in ("original", "flipped")]
    stored = targets.lookup(indices)
    assert stored.draws is not None
    for signal in ("draws", "hybrid"):
        given = FaceBatches(records, targets, temperature=4.0, signal=signal)[indices].targets
        assert given is not None
        assert given.log_weights is not None
        shares = (given.log_probs + given.log_weights).exp().numpy()
        for i, (row, flipped) in enumerate(zip(indices.rows, indices.flipped, strict=True)):
            here = slice(int(given.offsets[i]), int(given.offsets[i + 1]))
            classes, share = given.indices[here].numpy(), shares[here]
            if signal == "draws":
                counts = np.bincount(stored.draws.classes[i], minlength=6)
                assert sorted(classes) == list(np.flatnonzero(counts))
                np.testing.assert_allclose(share, counts[classes] / 3, rtol=1e-5)
                continue
            p = np.exp(log_softmax(logits[int(flipped)][row].astype(np.float64) / 4))
            group = stored.indices[stored.offsets[i] : stored.offsets[i + 1]]
            exact = np.isin(classes, group)
            np.testing.assert_allclose(share[exact], p[classes[exact]], rtol=1e-3)
            rest = 1 - p[group].sum()
            if not exact.all():
                chance = 1 - (1 - rest) ** 3
                assert share[~exact].sum() == pytest.approx(rest / chance, rel=5e-3, abs=1e-4)


def test_workers_send_the_weights_of_the_entries(drawn: tuple[Records, JoinedTargets]) -> None:
    records, targets = drawn
    dataset = FaceBatches(records, targets, temperature=4.0)
    assert dataset.signal == "draws"  # auto
    plans = BatchSampler(42, 8, 1, 0, flip=True)
    made = [list(BatchLoader(dataset, plans, workers=n, pin=False)) for n in (0, 2)]
    assert made[0][0].targets is not None
    assert isinstance(made[0][0].targets.log_weights, torch.Tensor)
    assert_same_batches(made[1], made[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "kd.temperature=1",
            r"kd\.temperature: the classes were drawn at 4, got 1; .*signal=group",
        ),
        ("kd.temperature=3", r"kd\.temperature: .* drawn at 4, got 3; set kd\.temperature=4$"),
    ],
)
def test_draws_are_used_at_their_temperature_alone(
    drawn: tuple[Records, JoinedTargets], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(small_config(override), *drawn, tmp_path / "run")


@pytest.mark.parametrize("signal", ["draws", "hybrid"])
def test_draws_of_a_cache_without_draws_are_refused(
    faces: Path, tmp_path: Path, signal: str
) -> None:
    with pytest.raises(ConfigError, match=rf"kd\.signal: {signal} needs drawn classes, .*--draws"):
        train(small_config(f"kd.signal={signal}"), *load(faces), tmp_path / "run")
