"""Targets of any teacher pass the checks; each violated invariant is reported with its sample."""

import functools
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.cache import invariants
from gkd.storage.cache.targets import SparseTargets, offsets_from_sizes
from tests.caches import dense_targets, labels_of, make_logits, make_spec
from tests.storage.cache.strategies import Teaching, teachings

check_invariants = functools.partial(invariants.check_invariants, deep=True)
SPEC = make_spec(num_samples=30, threshold=0.9)
LABELS = labels_of(SPEC)
TARGETS = dense_targets(make_logits(SPEC, "original"), LABELS, SPEC)[0]
PRESENT = np.ones(30, bool)


def edited(field: str, edit: Callable[[np.ndarray], None]) -> SparseTargets:
    values = getattr(TARGETS, field).copy()
    edit(values)
    return replace(TARGETS, **{field: values})


def repeat_class(indices: np.ndarray) -> None:
    start = TARGETS.offsets[20]
    indices[start + 2] = indices[start + 1]


def hide_label(indices: np.ndarray) -> None:
    group = slice(TARGETS.offsets[20], TARGETS.offsets[21])
    absent = np.setdiff1d(np.arange(50), indices[group])[0]
    indices[group][indices[group] == LABELS[20]] = absent


def ascend(codes: np.ndarray) -> None:
    codes[TARGETS.offsets[21] - 1] = 0


def positive_log(secondary: np.ndarray) -> None:
    secondary[20, 0] = 0.1


def not_a_number(secondary: np.ndarray) -> None:
    secondary[20, 2] = np.nan


def more_mass(secondary: np.ndarray) -> None:
    secondary[20, 1] = np.log(np.exp(secondary[20, 1]) + 2e-3)


@pytest.mark.parametrize(
    ("field", "edit", "array", "problem"),
    [
        ("indices", repeat_class, "indices", "a class twice in a group"),
        ("indices", hide_label, "indices", "its label is not in its group"),
        ("log2_probs", ascend, "log2_probs", "probabilities that do not descend"),
        ("secondary", positive_log, "secondary", "a log mass above 0 or not a number"),
        ("secondary", not_a_number, "secondary", "a log mass above 0 or not a number"),
        ("secondary", more_mass, "secondary", "group and secondary mass that do not sum to 1"),
    ],
)
@pytest.mark.parametrize("block_entries", [1, 64, 1 << 22])
def test_each_violation_is_reported_with_its_sample(
    field: str,
    edit: Callable[[np.ndarray], None],
    array: str,
    problem: str,
    block_entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gkd.storage.cache.invariants._BLOCK_ENTRIES", block_entries)
    assert list(check_invariants(SPEC, TARGETS, LABELS, PRESENT)) == []
    found = list(check_invariants(SPEC, edited(field, edit), LABELS, PRESENT))
    assert (array, 20, problem) in found


def test_an_empty_group_belongs_to_a_skipped_sample_only() -> None:
    present = PRESENT.copy()
    present[4] = False
    ((array, sample, problem),) = check_invariants(SPEC, TARGETS, LABELS, present)
    assert (array, sample) == ("sizes", 4)
    assert "an empty group, or one of a skipped sample" in problem


def test_samples_that_are_all_skipped_pass() -> None:
    empty = SparseTargets(
        np.zeros(3, np.int64),
        np.zeros(0, np.uint32),
        np.zeros(0, np.uint16),
        np.zeros((2, 3), np.float32),
    )
    assert list(check_invariants(SPEC, empty, LABELS[:2], np.zeros(2, bool))) == []


@given(
    st.lists(
        st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), min_size=1, max_size=9),
        min_size=1,
        max_size=9,
    )
)
def test_a_repeated_class_is_always_found(groups: list[list[int]]) -> None:
    targets = SparseTargets(
        offsets_from_sizes(np.array([len(group) for group in groups])),
        np.array([index for group in groups for index in group], np.uint32),
        np.zeros(sum(map(len, groups)), np.uint16),
        np.zeros((len(groups), 3), np.float32),
    )
    labels, present = np.zeros(len(groups), np.int64), np.ones(len(groups), bool)
    found = check_invariants(SPEC, targets, labels, present)
    repeated = [sample for sample, group in enumerate(groups) if len(set(group)) < len(group)]
    first = [sample for _, sample, problem in found if problem == "a class twice in a group"]
    assert first == repeated[:1]


TEMPERATURES = (0.5, 1.0, 2.0, 3.0, 4.0, 16.0)


@given(teachings(), st.sampled_from([TEMPERATURES, (1.0, 16.0), (0.5,), (3.0, 4.0)]))
def test_masses_of_any_teacher_pass(made: Teaching, temperatures: tuple[float, ...]) -> None:
    spec = msgspec.structs.replace(made.spec, temperatures=temperatures)
    targets, _ = dense_targets(made.logits, made.labels, spec)
    present = np.ones(len(targets), bool)
    assert list(check_invariants(spec, targets, made.labels, present)) == []


# Groups of 1 to 200 of 3,000 classes, with tails from one class to all of the same mass.
WIDE = make_spec(num_samples=60, num_classes=3000, max_group=200, temperatures=TEMPERATURES)


def wide_logits() -> np.ndarray:
    rng = np.random.default_rng(0)
    peaks = rng.normal(0, 1, (60, 3000)) * rng.uniform(0, 9, (60, 1))
    peaks[:20] = np.where(rng.random((20, 3000)) < 0.01, peaks[:20], 0.0)
    peaks[20:30] = np.where(rng.random((10, 3000)) < 0.001, 40.0, -60.0)
    peaks[np.arange(60), labels_of(WIDE)] += rng.uniform(0, 30, 60)
    return peaks


WIDE_TARGETS = dense_targets(wide_logits(), labels_of(WIDE), WIDE)[0]


@pytest.mark.parametrize("group_temperature", [2.0, 1.5, 8.0])
def test_masses_of_wide_groups_pass(group_temperature: float) -> None:
    spec = msgspec.structs.replace(WIDE, group_temperature=group_temperature)
    targets, _ = dense_targets(wide_logits(), labels_of(spec), spec)
    assert list(check_invariants(spec, targets, labels_of(spec), np.ones(60, bool))) == []


def mass_problems(secondary: np.ndarray) -> list[str]:
    targets = replace(WIDE_TARGETS, secondary=secondary.astype(np.float32))
    found = check_invariants(WIDE, targets, labels_of(WIDE), np.ones(60, bool))
    return [problem for _, _, problem in found]


@pytest.mark.parametrize("column", range(len(TEMPERATURES)))
def test_a_shifted_column_of_masses_is_found(column: int) -> None:
    secondary = WIDE_TARGETS.secondary.copy()
    secondary[:, column] = np.roll(secondary[:, column], 1)
    named = f"a secondary mass at {TEMPERATURES[column]:g} that no tail of classes has"
    if TEMPERATURES[column] == WIDE.group_temperature:
        named = "group and secondary mass that do not sum to 1"
    assert named in mass_problems(secondary)


@pytest.mark.parametrize(("left", "right"), [(1, 2), (1, 4), (2, 4), (0, 1), (3, 4), (4, 5)])
def test_swapped_columns_of_masses_are_found(left: int, right: int) -> None:
    secondary = WIDE_TARGETS.secondary.copy()
    secondary[:, [left, right]] = secondary[:, [right, left]]
    assert mass_problems(secondary)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_the_bounds_are_those_of_the_extreme_tails(factor: float) -> None:
    """A tail of equal classes and one of a single class, slightly beyond their bounds."""
    spec = make_spec(num_samples=2, num_classes=1002, max_group=1, temperatures=(1.0, 2.0, 4.0))
    # p of the group's class and of the others, at temperature 2.
    logits = np.full((2, 1002), -900.0)
    logits[0] = 2 * np.log(0.05 / 1001)
    logits[1, 1] = 2 * np.log(0.05)
    logits[:, 0] = 2 * np.log(0.95)
    labels, present = np.zeros(2, np.int64), np.ones(2, bool)
    targets, _ = dense_targets(logits, labels, spec)
    assert list(check_invariants(spec, targets, labels, present)) == []
    beyond = targets.secondary.copy()
    # A uniform tail is the lower bound at 1 and the upper at 4; a single class the reverse.
    masses = {(0, 0): factor < 1, (0, 2): factor > 1, (1, 0): factor > 1, (1, 2): factor < 1}
    for (sample, column), outside in masses.items():
        beyond[:] = targets.secondary
        beyond[sample, column] += np.log(factor)
        found = list(check_invariants(spec, replace(targets, secondary=beyond), labels, present))
        negligible = np.exp(targets.secondary[sample, column]) * 0.02 < 1e-6
        assert bool(found) == (outside and not negligible)
        assert not found or found[0][:2] == ("secondary", sample)


def test_a_group_mass_above_1_is_found() -> None:
    spec = msgspec.structs.replace(SPEC, temperatures=(1.0, 4.0))
    targets = replace(TARGETS, secondary=TARGETS.secondary[:, [0, 2]])
    assert list(check_invariants(spec, targets, LABELS, PRESENT)) == []
    codes = targets.log2_probs.copy()
    codes[targets.offsets[7] : targets.offsets[8]] = 0
    found = list(check_invariants(spec, replace(targets, log2_probs=codes), LABELS, PRESENT))
    assert ("secondary", 7, "a group mass above 1") in found
