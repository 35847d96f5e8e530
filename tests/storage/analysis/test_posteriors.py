import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from gkd.storage.analysis.posteriors import Posteriors
from gkd.storage.cache.spec import CacheSpec, DrawsSpec
from gkd.storage.cache.targets import SparseTargets, encode_log_probs, offsets_from_sizes
from tests.caches import add_draws, dense_targets, make_spec, without

TEMPERATURE = 2.0


def logits_of(spec: CacheSpec, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 4, (spec.num_samples, spec.num_classes))


def labels_of(spec: CacheSpec) -> npt.NDArray[np.int64]:
    return np.arange(spec.num_samples) % spec.num_classes


def without_margin(
    logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], spec: CacheSpec
) -> npt.NDArray[np.float64]:
    """Dense log p', from logits that include the label's margin."""
    cosines = logits / spec.scale
    cosines[np.arange(len(labels)), labels] += spec.margin
    softened = spec.scale * cosines / spec.group_temperature
    return np.asarray(softened - np.logaddexp.reduce(softened, axis=1, keepdims=True))


def small_spec(**settings: object) -> CacheSpec:
    spec = make_spec(num_samples=30, num_classes=40, max_group=40)
    return msgspec.structs.replace(spec, margin=0.05, **settings)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (1.0, 4.0)])
def test_probabilities_are_those_of_dense_logits_without_margin(
    threshold: float, temperatures: tuple[float, ...]
) -> None:
    spec = small_spec(threshold=threshold, temperatures=temperatures)
    logits, labels = logits_of(spec), labels_of(spec)
    targets, _ = dense_targets(logits, labels, spec)
    found = Posteriors.from_targets(targets, labels, spec)
    expected = without_margin(logits, labels, spec)
    assert np.array_equal(found.classes, targets.indices)
    assert found.log_probs == pytest.approx(expected[found.rows, found.classes], abs=2e-3)
    assert found.log_own == pytest.approx(expected[np.arange(30), labels], abs=2e-3)
    inside = np.zeros((30, 40), bool)
    inside[found.rows, found.classes] = True
    rest = np.where(inside, 0, np.exp(expected)).sum(1)
    assert np.exp(found.log_rest) == pytest.approx(rest, abs=1e-3)
    highest = np.where(inside, -np.inf, expected).max(1)
    assert (highest <= found.log_absent + 2e-3).all()
    assert (found.log_absent <= found.log_rest + 1e-12).all()
    parts = np.where(inside, np.exp(expected) * expected, 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lump = np.nan_to_num(rest * np.log(rest))
    assert found.entropy() == pytest.approx(-parts - lump, abs=1e-2)


def test_differences_of_cosines_are_exact_even_if_the_label_has_no_probability() -> None:
    spec = msgspec.structs.replace(small_spec(), margin=0.4, group_temperature=2.0)
    labels = labels_of(spec)
    cosines = np.random.default_rng(1).uniform(-0.2, 0.2, (30, 40))
    best = (labels + 1) % 40
    cosines[np.arange(30), best] = 0.7
    logits = spec.scale * cosines
    logits[np.arange(30), labels] -= spec.scale * spec.margin
    targets, _ = dense_targets(logits, labels, spec)
    found = Posteriors.from_targets(targets, labels, spec)
    assert np.array_equal(found.top_others(labels), best)
    lead = spec.group_temperature / spec.scale * (found.log_probs_of(best) - found.log_own)
    expected = cosines[np.arange(30), best] - cosines[np.arange(30), labels]
    assert lead == pytest.approx(expected, abs=5e-5)


def test_a_skipped_sample_has_no_posterior() -> None:
    spec = small_spec()
    logits, labels = logits_of(spec), labels_of(spec)
    targets, _ = dense_targets(logits, labels, spec)
    found = Posteriors.from_targets(without(targets, [0, 7, 29]), labels, spec)
    assert np.flatnonzero(np.isneginf(found.log_own)).tolist() == [0, 7, 29]
    assert not np.isin(found.rows, [0, 7, 29]).any()
    full = Posteriors.from_targets(targets, labels, spec)
    assert np.array_equal(found.log_own[1:7], full.log_own[1:7])


def label_only(
    logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], spec: CacheSpec
) -> SparseTargets:
    """Groups as ``--threshold 0`` makes them."""
    columns = []
    for temperature in spec.temperatures:
        softened = logits / temperature
        log_probs = softened - np.logaddexp.reduce(softened, axis=1, keepdims=True)
        columns.append(np.log1p(-np.exp(log_probs[np.arange(len(labels)), labels])))
    softened = logits / spec.group_temperature
    log_probs = softened - np.logaddexp.reduce(softened, axis=1, keepdims=True)
    return SparseTargets(
        offsets_from_sizes(np.ones(len(labels), np.int64)),
        labels.astype(np.uint32),
        encode_log_probs(log_probs[np.arange(len(labels)), labels]),
        np.stack(columns, 1).astype(np.float32),
    )


@pytest.mark.parametrize("grouped", [True, False])
def test_drawn_classes_are_entries_at_the_group_temperature(grouped: bool) -> None:
    draws = DrawsSpec(16, 4.0, "all")
    spec = small_spec(draws=draws, threshold=0.5 if grouped else 0.0)
    logits, labels = logits_of(spec), labels_of(spec)
    if grouped:
        targets, _ = dense_targets(logits, labels, spec)
    else:
        targets = label_only(logits, labels, spec)
    targets = add_draws(targets, logits, spec)
    assert targets.draws is not None
    found = Posteriors.from_targets(targets, labels, spec)
    expected = without_margin(logits, labels, spec)
    assert found.log_probs == pytest.approx(expected[found.rows, found.classes], abs=5e-3)
    stored = np.split(targets.indices, targets.offsets[1:-1])
    for row in range(30):
        held = found.classes[found.offsets[row] : found.offsets[row + 1]].tolist()
        assert sorted(held) == sorted({*stored[row].tolist(), *targets.draws.classes[row].tolist()})
        others = [expected[row, label] for label in held if label != labels[row]]
        assert others == sorted(others, reverse=True)
        outside = np.delete(np.exp(expected[row]), held).sum()
        assert np.exp(found.log_rest[row]) == pytest.approx(outside, abs=2e-3)
        assert np.delete(expected[row], held).max() <= found.log_absent[row] + 1e-2


def test_a_group_of_the_label_alone_names_no_other_class() -> None:
    spec = small_spec(threshold=0.0)
    labels = labels_of(spec)
    found = Posteriors.from_targets(label_only(logits_of(spec), labels, spec), labels, spec)
    assert (found.top_others(labels) == -1).all()
    assert np.isnan(found.log_probs_of(np.full(30, -1))).all()
    assert np.exp(found.log_own) + np.exp(found.log_rest) == pytest.approx(np.ones(30), abs=1e-3)
