"""Draws of a correct cache pass the checks; each violated invariant is found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from gkd.storage.cache.invariants import check_invariants
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DrawsSpec
from gkd.storage.cache.targets import SparseTargets
from gkd.storage.cache.verify import verify
from tests.caches import make_cache
from tests.tampering import rewrite_row

PRESENT = np.arange(40) != 1  # row 41 of the second shard is skipped


@pytest.fixture(scope="module", params=["all", "primary"])
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Cache:
    source: Literal["all", "primary"] = request.param
    return make_cache(
        tmp_path_factory.mktemp("made") / "c",
        max_group=49,
        skipped={41: "no image"},
        draws=DrawsSpec(12, 4.0, source),
    )


def problems(cache: Cache, targets: SparseTargets) -> list[tuple[str, int, str]]:
    """Violated invariants of targets as those of the second shard."""
    labels = cache.read_samples(1)["label"].to_numpy()
    return list(check_invariants(cache.spec, targets, labels, PRESENT, deep=True))


def test_correct_draws_pass(made: Cache) -> None:
    assert verify(made.path).ok
    targets = made.read_shard(1, "original")
    assert targets.draws is not None
    assert (targets.sizes < 49).any()
    assert not targets.draws.classes[1].any()
    assert problems(made, targets) == []


def with_draws(targets: SparseTargets, **arrays: np.ndarray) -> SparseTargets:
    assert targets.draws is not None
    return replace(targets, draws=replace(targets.draws, **arrays))


def a_class_twice(targets: SparseTargets) -> SparseTargets:
    assert targets.draws is not None
    draws, codes = targets.draws.classes.copy(), targets.draws.log2_probs.copy()
    draws[7, :2], codes[7, :2] = draws[7, 0], [codes[7, 0], codes[7, 0] + 1]
    return with_draws(targets, classes=draws, log2_probs=codes)


def excessive_mass(targets: SparseTargets) -> SparseTargets:
    assert targets.draws is not None
    codes = targets.draws.log2_probs.copy()
    codes[7] = 0
    return with_draws(targets, log2_probs=codes)


def another_probability(targets: SparseTargets) -> SparseTargets:
    assert targets.draws is not None
    codes = targets.draws.log2_probs.copy()
    entry = targets.indices[targets.offsets[7]]
    draws = targets.draws.classes.copy()
    draws[7] = entry
    codes[7] = 9000
    return with_draws(targets, classes=draws, log2_probs=codes)


def draws_of_a_skipped_sample(targets: SparseTargets) -> SparseTargets:
    assert targets.draws is not None
    draws = targets.draws.classes.copy()
    draws[1, 3] = 5
    return with_draws(targets, classes=draws)


@pytest.mark.parametrize(
    ("change", "array", "sample", "problem"),
    [
        (a_class_twice, "draw_log2_probs", 7, "a class with two probabilities"),
        (excessive_mass, "draw_log2_probs", 7, "distinct classes of more mass than there is"),
        (another_probability, "draw_log2_probs", 7, "not the probability of its entry"),
        (draws_of_a_skipped_sample, "draws", 1, "draws of a skipped sample"),
    ],
)
def test_each_violation_is_reported_with_its_sample(
    made: Cache,
    change: Callable[[SparseTargets], SparseTargets],
    array: str,
    sample: int,
    problem: str,
) -> None:
    wrong = change(made.read_shard(1, "original"))
    assert (array, sample, problem) in problems(made, wrong)


def test_draws_from_a_group_are_in_it_and_have_its_mass(made: Cache) -> None:
    targets = made.read_shard(1, "original")
    assert targets.draws is not None
    sample = int(np.flatnonzero((targets.sizes > 0) & (targets.sizes < 49))[0])
    group = targets.indices[targets.offsets[sample] : targets.offsets[sample + 1]]
    draws = targets.draws.classes.copy()
    draws[sample, 0] = np.setdiff1d(np.arange(50), group)[0]
    found = [p for *_, p in problems(made, with_draws(targets, classes=draws))]
    outside = "a class outside the group that it was drawn from"
    assert (outside in found) == (made.spec.draws == DrawsSpec(12, 4.0, "primary"))
    if targets.draws.secondary is not None:
        for other in (
            targets.draws.secondary - np.float32(0.5),
            np.zeros_like(PRESENT, np.float32),
        ):
            changed = with_draws(targets, secondary=np.where(PRESENT, other, np.float32(0)))
            found = [p for *_, p in problems(made, changed)]
            assert "not the mass outside its group" in found


def test_deep_verify_names_the_file(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", draws=DrawsSpec(12, 4.0, "all"))
    wrong = excessive_mass(cache.read_shard(2, "flipped"))
    rewrite_row(cache, "flipped/draw_log2_probs", 2, wrong.arrays()["draw_log2_probs"])
    assert verify(cache.path, level="hashes").ok
    fault = verify(cache.path).faults[0]
    assert fault.file == "flipped/draw_log2_probs/c/2/0/0"
    assert fault.problem == "row 87: distinct classes of more mass than there is"
