"""Confusions agree with those computed from dense float64 logits."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from gkd.storage.analysis import confusions as module
from gkd.storage.analysis.confusions import Confusions, confusions, examples
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.samples import ShardSamples
from gkd.storage.cache.spec import VIEWS, CacheSpec, DrawsSpec, View
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import IncompleteCacheError
from tests.caches import add_draws, dense_targets, digest_of, make_cache, make_spec, without

CLASSES, SAMPLES = 12, 90
SKIPPED = {4: "no image", 71: "no image"}


@dataclass(frozen=True)
class Dense:
    """A teacher without truncation: cosines float64 [views, N, C] and labels."""

    spec: CacheSpec
    cosines: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]

    @property
    def logits(self) -> npt.NDArray[np.float64]:
        """With the label's margin, as in a cache."""
        margins = self.spec.margin * np.eye(self.spec.num_classes)[self.labels]
        return self.spec.scale * (self.cosines - margins)

    @property
    def probs(self) -> npt.NDArray[np.float64]:
        """p' [views, N, C], without the margin."""
        softened = self.spec.scale * self.cosines / self.spec.group_temperature
        return np.asarray(np.exp(softened - np.logaddexp.reduce(softened, axis=2, keepdims=True)))

    def leads(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Lead [N] and the leading class, among the likeliest other class of each view."""
        rows = np.arange(len(self.labels))
        others = self.cosines.copy()
        others[:, rows, self.labels] = -np.inf
        lead, who = np.full(len(rows), -np.inf), np.full(len(rows), -1)
        for first in others.argmax(2):
            ahead = (self.cosines[:, rows, first] - self.cosines[:, rows, self.labels]).mean(0)
            lead, who = np.where(ahead > lead, ahead, lead), np.where(ahead > lead, first, who)
        return lead, who

    def pairs(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean mass [C, C] that images of a class give to another, and B (see ``confusions``)."""
        own = np.take_along_axis(self.probs, self.labels[None, :, None], 2)
        sums = np.zeros((2, CLASSES, CLASSES))
        for values, out in zip((self.probs, np.sqrt(self.probs * own)), sums, strict=True):
            np.add.at(out, self.labels[self.kept], values.mean(0)[self.kept])
        counts = np.bincount(self.labels[self.kept], minlength=CLASSES)
        return sums[0] / counts[:, None], sums[1] / counts[:, None]


def dense(
    *, threshold: float = 1.0, views: tuple[View, ...] = VIEWS, draws: DrawsSpec | None = None
) -> Dense:
    spec = make_spec(
        num_samples=SAMPLES,
        num_classes=CLASSES,
        max_group=CLASSES,
        threshold=threshold,
        views=views,
        draws=draws,
    )
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, SAMPLES)
    person = labels.copy()
    person[labels == 1] = 0  # one person under labels 0 and 1
    wrong = rng.choice(np.flatnonzero(labels > 1), 9, replace=False)
    person[wrong] = (person[wrong] + 1) % CLASSES
    cosines = rng.uniform(-0.2, 0.2, (1, SAMPLES, CLASSES))
    cosines = cosines + rng.normal(0, 0.02, (len(views), SAMPLES, CLASSES))
    cosines[:, np.arange(SAMPLES), person] += 0.5
    alike = cosines[:, person == 0, 0]
    cosines[:, person == 0, 1] = alike + rng.normal(0, 0.02, alike.shape)
    cosines[:, 10:13] *= 0.1  # hard
    return Dense(spec, cosines, labels, ~np.isin(np.arange(SAMPLES), list(SKIPPED)))


def write(path: Path, made: Dense, *, max_group: int = CLASSES) -> Cache:
    spec = msgspec.structs.replace(made.spec, max_group=max_group)
    writer = CacheWriter(path, spec)
    for shard in writer.pending():
        rows = spec.shard_rows(shard)
        inside = slice(rows.start, rows.stop)
        skipped = {row - rows.start: why for row, why in SKIPPED.items() if row in rows}
        views, truncated = {}, {}
        for view, logits in zip(spec.views, made.logits, strict=True):
            targets, truncated[view] = dense_targets(logits[inside], made.labels[inside], spec)
            views[view] = without(add_draws(targets, logits[inside], spec), list(skipped))
        digests = np.frombuffer(b"".join(map(digest_of, rows)), np.uint8).reshape(-1, 16)
        keys = [f"key {row}" for row in rows]
        samples = ShardSamples(keys, made.labels[inside], digests, skipped)
        writer.write_shard(shard, views, samples, truncated=truncated)
    writer.finish()
    return Cache.open(path)


def rows_of(found: Confusions, name: str) -> dict[int, Mapping[str, object]]:
    return {item["row"]: item for item in getattr(found, name).to_pylist()}


@pytest.mark.parametrize("views", [VIEWS, VIEWS[1:]])
def test_label_noise_is_that_of_the_dense_teacher(tmp_path: Path, views: tuple[View, ...]) -> None:
    made = dense(views=views)
    found = confusions(write(tmp_path / "c.gkd", made))
    lead, who = made.leads()
    suspected = np.flatnonzero((lead > 0) & made.kept)
    table = found.label_noise
    assert table["row"].to_pylist() == suspected[np.argsort(-lead[suspected])].tolist()
    assert len(suspected) >= 9
    probs = made.probs.mean(0)
    pairs = {(int(made.labels[row]), int(who[row])) for row in suspected}
    for item in table.to_pylist():
        row = item["row"]
        assert (item["key"], item["digest"]) == (f"key {row}", digest_of(row))
        assert (item["label"], item["other"]) == (made.labels[row], who[row])
        assert item["lead"] == pytest.approx(lead[row], abs=1e-4)
        assert item["own"] == pytest.approx(probs[row, item["label"]], rel=2e-3)
        assert item["other_prob"] == pytest.approx(probs[row, item["other"]], rel=2e-3)
        assert item["images"] == (made.labels[made.kept] == item["label"]).sum()
        assert item["other_images"] == (made.labels[made.kept] == item["other"]).sum()
        assert item["swapped"] == ((item["other"], item["label"]) in pairs)

    claim = np.maximum(probs[np.arange(SAMPLES), made.labels], probs[np.arange(SAMPLES), who])
    hard = np.flatnonzero((claim < 0.5) & made.kept)
    assert {10, 11, 12} <= set(hard.tolist())
    assert found.hard["row"].to_pylist() == hard[np.argsort(claim[hard])].tolist()
    entropy = -(made.probs * np.log(made.probs)).sum(2).mean(0)
    for item in found.hard.to_pylist():
        assert item["claim"] == pytest.approx(claim[item["row"]], rel=2e-3)
        assert item["entropy"] == pytest.approx(entropy[item["row"]], abs=5e-3)
        assert item["captured"] == pytest.approx(1)
        assert probs[item["row"], item["likeliest"]] == pytest.approx(item["claim"], rel=2e-3)

    kept_own = probs[np.arange(SAMPLES), made.labels]
    assert found.own[made.kept] == pytest.approx(kept_own[made.kept], rel=2e-3, abs=1e-7)
    assert (found.own[~made.kept] == -1).all()
    assert found.left_out == 0


def test_identities_are_those_of_the_dense_teacher(tmp_path: Path) -> None:
    made = dense()
    found = confusions(write(tmp_path / "c.gkd", made))
    mass, shared = made.pairs()
    overlap = np.sqrt(shared * shared.T)
    items = found.identities.to_pylist()
    assert (items[0]["a"], items[0]["b"]) == (0, 1)
    assert items[0]["overlap"] > 3 * items[1]["overlap"]
    values = [item["overlap"] for item in items]
    assert values == sorted(values, reverse=True)
    for item in items:
        a, b = item["a"], item["b"]
        assert a < b
        assert item["overlap"] == pytest.approx(overlap[a, b], abs=3e-4)
        assert item["mass_ab"] == pytest.approx(mass[a, b], abs=3e-4)
        assert item["mass_ba"] == pytest.approx(mass[b, a], abs=3e-4)
        for side in "ab":
            assert item[f"images_{side}"] == (made.labels[made.kept] == item[side]).sum()
            best = np.where((made.labels == item[side]) & made.kept, found.own, -2).argmax()
            assert item[f"key_{side}"] == f"key {best}"
    listed = {(item["a"], item["b"]) for item in items}
    for a, b in itertools.combinations(range(CLASSES), 2):
        assert (a, b) in listed or overlap[a, b] < 2e-4


@pytest.mark.parametrize(("threshold", "max_group"), [(0.9, CLASSES), (0.9, 3), (1.0, 2)])
def test_truncated_groups_miss_no_label_error(
    tmp_path: Path, threshold: float, max_group: int
) -> None:
    made = dense(threshold=threshold)
    found = confusions(write(tmp_path / "c.gkd", made, max_group=max_group))
    lead, _ = made.leads()
    listed = rows_of(found, "label_noise")
    assert set(np.flatnonzero((lead > 0) & made.kept).tolist()) <= listed.keys()
    for row, item in listed.items():
        # A class that a view lacks counts with its upper bound, so never too little.
        assert item["lead"] >= lead[row] - 1e-4
        assert item["lead"] <= lead[row] + 0.1
    assert found.identities["a"][0].as_py() == 0
    assert found.identities["b"][0].as_py() == 1


def test_draws_replace_small_groups(tmp_path: Path) -> None:
    made = dense(threshold=0.0, draws=DrawsSpec(64, 4.0, "all"))
    cache = write(tmp_path / "c.gkd", made, max_group=2)
    found = confusions(cache)
    lead, who = made.leads()
    for row, item in rows_of(found, "label_noise").items():
        assert item["lead"] == pytest.approx(lead[row], abs=0.05)
    certain = np.flatnonzero((lead > 0.1) & made.kept)
    listed = rows_of(found, "label_noise")
    assert [listed[row]["other"] for row in certain.tolist()] == who[certain].tolist()
    mass, _ = made.pairs()
    items = found.identities.to_pylist()
    assert (items[0]["a"], items[0]["b"]) == (0, 1)
    assert items[0]["mass_ab"] == pytest.approx(mass[0, 1], rel=0.05)


def test_renumbered_classes_change_nothing_else(tmp_path: Path) -> None:
    made = dense()
    first = confusions(write(tmp_path / "a.gkd", made))
    names = np.random.default_rng(9).permutation(CLASSES)
    cosines = np.empty_like(made.cosines)
    cosines[:, :, names] = made.cosines
    second = confusions(
        write(tmp_path / "b.gkd", Dense(made.spec, cosines, names[made.labels], made.kept))
    )
    for name in ("label_noise", "hard"):
        before, after = getattr(first, name), getattr(second, name)
        assert before["row"].to_pylist() == after["row"].to_pylist()
        assert names[before["label"].to_numpy()].tolist() == after["label"].to_pylist()
    renamed = [
        {int(names[item["a"]]), int(names[item["b"]])} for item in first.identities.to_pylist()
    ]
    assert [{item["a"], item["b"]} for item in second.identities.to_pylist()][:5] == renamed[:5]


def test_too_many_pairs_lose_no_more_than_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 60)
    made = dense()
    cache = write(tmp_path / "c.gkd", made)
    full = confusions(cache)
    found = confusions(cache, max_pairs=60)
    mass, shared = made.pairs()
    assert 0 < found.left_out < 0.5
    assert len(found.identities) < len(full.identities)
    items = found.identities.to_pylist()
    assert (items[0]["a"], items[0]["b"]) == (0, 1)
    for item in items:
        for there, name in (
            ((item["a"], item["b"]), "mass_ab"),
            ((item["b"], item["a"]), "mass_ba"),
        ):
            assert mass[there] - found.left_out - 3e-4 <= item[name] <= mass[there] + 3e-4
    listed = {(item["a"], item["b"]) for item in items}
    for a, b in itertools.combinations(range(CLASSES), 2):
        assert (a, b) in listed or min(shared[a, b], shared[b, a]) <= found.left_out + 3e-4
    assert full.label_noise == found.label_noise


def test_lists_are_cut_to_the_worst(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.gkd", dense())
    full, few = confusions(cache), confusions(cache, max_rows=3)
    for name in ("identities", "label_noise", "hard"):
        assert getattr(few, name).select([0]) == getattr(full, name).select([0]).slice(0, 3)
    # `swapped` depends on the rows in the list.
    assert few.label_noise.drop(["swapped"]) == full.label_noise.drop(["swapped"]).slice(0, 3)


def test_examples_have_the_highest_probability_of_their_label(tmp_path: Path) -> None:
    made = dense()
    found = confusions(write(tmp_path / "c.gkd", made))
    given = examples(made.labels, found.own, [7, 3, 3], 4)
    assert list(given) == [3, 7]
    for label, rows in given.items():
        own = np.flatnonzero((made.labels == label) & made.kept)
        assert rows == own[np.argsort(-found.own[own], kind="stable")][:4].tolist()
    assert examples(made.labels, found.own, [], 4) == {}


def test_a_cache_of_skipped_samples_alone_has_no_confusions(tmp_path: Path) -> None:
    found = confusions(make_cache(tmp_path / "c.gkd", skipped=dict.fromkeys(range(100), "bad")))
    assert [len(t) for t in (found.identities, found.label_noise, found.hard)] == [0, 0, 0]
    assert examples(found.samples.labels, found.own, [3], 2) == {3: []}


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    CacheWriter(tmp_path / "c.gkd", dense().spec)
    with pytest.raises(IncompleteCacheError):
        confusions(Cache.open(tmp_path / "c.gkd"))
