"""Proves that a cache came from the teacher it names: recomputes a random sample, densely.

Logits of all classes are made for a few images at a time and every quantity is taken from them in
float64 as it is defined, by none of the code that made the cache. Differences are natural logs of
probabilities, so that they mean the same for a class with p = 0.9 and for one with p = 1e-9.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.pipeline.centers.load import CLASS_MEAN, Centers, load_centers, round_centers
from gkd.pipeline.centers.means import centers_path
from gkd.pipeline.checks.draw_test import DrawCounts, DrawTest
from gkd.pipeline.teacher.embedder import Embedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CacheSpec, View
from gkd.storage.cache.targets import MAX_CODE, STEPS_PER_OCTAVE, SparseTargets, decode_log_probs
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.records.digests import digests
from gkd.storage.records.images import digest
from gkd.storage.util.progress import progress

BATCH_LOGITS = 1 << 26
STEP = math.log(2) / STEPS_PER_OCTAVE
LEAST_LOG_PROB = -MAX_CODE * STEP
# How far a cosine may move where another machine, batch or kernel computes it again.
COSINE_ROUNDING = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Differences:
    """The largest differences between stored and recomputed targets, in natural logs.

    membership  by how much the probabilities would have to move for the stored group to be the
                primary group
    log_probs   of the group's probabilities
    secondary   of the mass outside the group, by temperature
    draws       of the probabilities of drawn classes, of the mass outside the group they are of,
                and by how much these classes would have to move to be in it; 0 without draws
    """

    membership: float
    log_probs: float
    secondary: Mapping[str, float]
    draws: float = 0.0

    def exceed(self, allowed: "Differences") -> bool:
        """Whether one of them is above what is allowed, or is no number."""
        inside = (
            self.membership <= allowed.membership
            and self.log_probs <= allowed.log_probs
            and self.draws <= allowed.draws
            and all(value <= allowed.secondary[t] for t, value in self.secondary.items())
        )
        return not inside


@dataclass(frozen=True)
class AgainstReport:
    """What a recomputation found.

    ``targets`` are the sampled images in all views; ``other_groups`` of them are not the primary
    group to the last class (which rounding may do at its end), ``wrong`` differ by more than is
    allowed, ``first_wrong`` says where the first of these is. ``drawn`` tests all draws and
    ``first_drawn`` the first quarter of each sample's, which must be draws too; None without any.
    """

    images: int
    targets: int
    seed: int
    found: Differences
    allowed: Differences
    other_groups: int
    wrong: int
    first_wrong: str
    drawn: DrawTest | None = None
    first_drawn: DrawTest | None = None

    @property
    def ok(self) -> bool:
        """Whether every sampled target is the teacher's, to the stored precision."""
        tests = (self.drawn, self.first_drawn)
        return not self.wrong and all(test is None or test.ok for test in tests)


def verify_against(
    cache: Cache,
    records: Records,
    embedder: Embedder,
    centers: Centers,
    *,
    sample: int = 256,
    seed: int = 0,
    workers: int = 2,
) -> AgainstReport:
    """Recompute the targets of ``sample`` images of the cache, drawn by ``seed``.

    Raises:
        ConfigError: where nothing is to be sampled.
        SpecMismatchError: where teacher or centres are not those that the cache names, or images
            of the sample are not among the records.
        CorruptShardError: where the cache is damaged.
        CorruptRecordError: where an image cannot be read.
    """
    _require_named(cache.spec, embedder, centers)
    if sample < 1:
        raise ConfigError(f"sample: expected 1 or more, got {sample}")
    samples = cache.samples()
    present = np.flatnonzero(samples.present)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(present, min(sample, len(present)), replace=False))
    places = _find(cache, records, rows, samples.digests[rows], workers=workers)

    allowed = allowed_differences(cache.spec)
    each: list[Differences] = []
    wrong: list[str] = []
    counts, first_counts = DrawCounts(), DrawCounts()
    for view, row, place, logits, group in _recomputed(
        cache, records, embedder, _as_multiplied(centers, cache.spec), rows, places, samples.labels
    ):
        label = int(samples.labels[row])
        differences = compare(cache.spec, group, label, logits)
        each.append(differences)
        if group.draws is not None:
            drawn, log_probs = group.draws[0], _drawn_from(cache.spec, label, logits)
            counts.add(drawn, log_probs)
            first_counts.add(drawn[: -(-len(drawn) // 4)], log_probs)
        if differences.exceed(allowed):
            wrong.append(f"{records.where(place)}, row {row} of the cache, {view} view")
    return AgainstReport(
        images=len(rows),
        targets=len(each),
        seed=seed,
        found=_largest(each),
        allowed=allowed,
        other_groups=sum(differences.membership > 0 for differences in each),
        wrong=len(wrong),
        first_wrong=wrong[0] if wrong else "",
        drawn=None if cache.spec.draws is None else counts.test(),
        first_drawn=None if cache.spec.draws is None else first_counts.test(),
    )


def load_named_centers(cache: Cache, files: Sequence[Path]) -> Centers:
    """Centres from files, or where there are none, the class means that stand beside the cache.

    Raises:
        ConfigError: where a file is missing or holds no centres of this shape.
        SpecMismatchError: where their number is not that of the cache's classes.
    """
    spec = cache.spec
    beside = centers_path(cache.path)
    if not files and not (spec.centers.kind == CLASS_MEAN and beside.exists()):
        raise ConfigError(
            f"{cache.path}: expected its centres ({spec.centers.kind}: {spec.centers.name}), got "
            f"none, and there is no {beside}; it does not travel with "
            "the cache: ask its makers for that file and give it by --centers FILE"
        )
    array = load_centers(files or [beside], spec.num_classes, spec.teacher.embedding_dim)
    return Centers(array, spec.centers.kind, spec.centers.name)


def _as_multiplied(centers: Centers, spec: CacheSpec) -> npt.NDArray[np.float32]:
    """The centres [C, D] with the rounding that the cache's logits have seen."""
    return round_centers(centers.array, spec.centers.precision).float().numpy()


def allowed_differences(spec: CacheSpec) -> Differences:
    """Half a step of the stored codes, and what rounding of cosines makes of a log-probability.

    A cosine that moves by d moves log p(T) by at most 2 * scale * d / T: itself and the sum.
    """
    cosine = COSINE_ROUNDING[spec.precision]

    def moved(temperature: float) -> float:
        return 2 * spec.scale * cosine / temperature

    at_group = STEP / 2 + moved(spec.group_temperature)
    secondary = {f"{t:g}": STEP / 2 + moved(t) for t in spec.temperatures}
    draws = 0.0 if spec.draws is None else STEP / 2 + moved(spec.draws.temperature)
    return Differences(at_group, at_group, secondary, draws)


def compare(
    spec: CacheSpec, stored: SparseTargets, label: int, logits: npt.NDArray[np.float64]
) -> Differences:
    """Differences of one sample's stored targets from its recomputed logits float64 [C]."""
    group = stored.indices.astype(np.int64)
    log_probs = _log_softmax(logits / spec.group_temperature)
    kept = np.maximum(log_probs[group], LEAST_LOG_PROB)
    secondary = {}
    for place, temperature in enumerate(spec.temperatures):
        log_mass = _log_mass_outside(logits / temperature, group)
        secondary[f"{temperature:g}"] = _distance(float(stored.secondary[0, place]), log_mass)
    return Differences(
        membership=group_gap(
            log_probs, group, label, threshold=spec.threshold, max_group=spec.max_group
        ),
        log_probs=float(np.abs(decode_log_probs(stored.log2_probs) - kept).max()),
        secondary=secondary,
        draws=_draws_difference(spec, stored, label, logits),
    )


def _draws_difference(
    spec: CacheSpec, stored: SparseTargets, label: int, logits: npt.NDArray[np.float64]
) -> float:
    if spec.draws is None:
        return 0.0
    assert stored.draws is not None
    drawn = stored.draws.classes[0].astype(np.int64)
    log_probs = _log_softmax(logits / spec.draws.temperature)
    kept = np.maximum(log_probs[drawn], LEAST_LOG_PROB)
    difference = float(np.abs(decode_log_probs(stored.draws.log2_probs[0]) - kept).max())
    if stored.draws.secondary is None:
        return difference
    away = min(
        max(
            _distance(
                float(stored.draws.secondary[0]),
                _log_mass_outside(logits / spec.draws.temperature, group),
            ),
            float(log_probs[group].min() - log_probs[drawn].min()),
        )
        for group in _uncut_groups(spec, label, logits)
    )
    return max(difference, away)


def _uncut_groups(
    spec: CacheSpec, label: int, logits: npt.NDArray[np.float64]
) -> Iterator[npt.NDArray[np.int64]]:
    """The primary group without a cap, and those that rounding at its end could make of it."""
    order = np.argsort(-logits, kind="stable")
    masses = np.exp(_log_softmax(logits[order] / spec.group_temperature)).cumsum()
    rounding = COSINE_ROUNDING[spec.precision]
    needed = int(np.searchsorted(masses, spec.threshold)) + 1 if spec.threshold else 0
    sizes = [min(needed, len(order))]
    if needed > 1 and masses[needed - 2] > spec.threshold - rounding:
        sizes.append(needed - 1)
    if 0 < needed < len(order) and masses[needed - 1] < spec.threshold + rounding:
        sizes.append(needed + 1)
    for size in sizes:
        group = order[:size]
        yield group if label in group else np.append(group, label)


def _drawn_from(
    spec: CacheSpec, label: int, logits: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Log-probabilities [C] that draws have, -inf where they cannot be."""
    assert spec.draws is not None
    scaled = logits / spec.draws.temperature
    if spec.draws.source == "primary":
        outside = np.ones(len(logits), bool)
        outside[next(_uncut_groups(spec, label, logits))] = False
        scaled = np.where(outside, -np.inf, scaled)
    return _log_softmax(scaled)


def group_gap(
    log_probs: npt.NDArray[np.float64],
    group: npt.NDArray[np.int64],
    label: int,
    *,
    threshold: float,
    max_group: int,
) -> float:
    """By how much log-probabilities [C] would have to move to make ``group`` the primary group.

    The group but for the label must be a prefix of the classes by descending probability: no class
    outside may stand above one inside. The prefix must reach the threshold and not without its
    last class, unless ``max_group`` cut it. 0 where all this holds.
    """
    if label not in group:
        return math.inf
    outside = log_probs.copy()
    outside[group] = -math.inf
    others = group[group != label]
    gap = max(0.0, float(outside.max() - log_probs[others].min())) if len(others) else 0.0

    inside = np.sort(np.exp(log_probs[group]))[::-1]
    prefixes = [inside]
    if log_probs[label] == log_probs[group].min():
        prefixes.append(inside[:-1])  # the label was added to a prefix without it
    cut = len(group) == max_group
    return gap + min(_threshold_gap(prefix, threshold, cut) for prefix in prefixes)


def _threshold_gap(prefix: npt.NDArray[np.float64], threshold: float, cut: bool) -> float:
    too_long = max(0.0, float(prefix[:-1].sum()) - threshold)
    too_short = 0.0 if cut else max(0.0, threshold - float(prefix.sum()))
    return max(too_long, too_short)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    log_probs: npt.NDArray[np.float64] = shifted - math.log(np.exp(shifted).sum())
    return log_probs


def _log_mass_outside(logits: npt.NDArray[np.float64], group: npt.NDArray[np.int64]) -> float:
    """Natural log of the softmax's mass outside the group, by a sum of the outside itself."""
    terms = np.exp(logits - logits.max())
    total = terms.sum()
    terms[group] = 0.0
    outside = terms.sum()
    return math.log(outside / total) if outside > 0 else -math.inf


def _distance(left: float, right: float) -> float:
    # A mass below what a float64 sum of the others can show is as good as none.
    if max(left, right) < -700:
        return 0.0
    return abs(left - right)


def _largest(each: list[Differences]) -> Differences:
    return Differences(
        membership=max(d.membership for d in each),
        log_probs=max(d.log_probs for d in each),
        secondary={t: max(d.secondary[t] for d in each) for t in each[0].secondary},
        draws=max(d.draws for d in each),
    )


def _require_named(spec: CacheSpec, embedder: Embedder, centers: Centers) -> None:
    named = {
        "teacher's sha256": (spec.teacher.sha256, embedder.sha256),
        "embedding_dim": (spec.teacher.embedding_dim, embedder.embedding_dim),
        "preprocess": (spec.preprocess, embedder.preprocess),
        "precision": (spec.precision, embedder.precision),
        "centres' sha256": (spec.centers.sha256, centers.spec.sha256),
    }
    differing = [
        f"  {what}: the cache names {_plain(theirs)}, given is {_plain(ours)}"
        for what, (theirs, ours) in named.items()
        if theirs != ours
    ]
    if differing:
        raise SpecMismatchError(
            f"the cache names the teacher {spec.teacher.name} and the centres {spec.centers.name}, "
            "others are given:\n" + "\n".join(differing) + "\nGive those that the cache names."
        )


def _plain(value: object) -> object:
    return msgspec.to_builtins(value)


def _find(
    cache: Cache,
    records: Records,
    rows: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.uint8],
    *,
    workers: int,
) -> npt.NDArray[np.int64]:
    """Row of the records for each sampled row of the cache, by the images' content."""
    if records.fingerprint == cache.spec.dataset.fingerprint:
        found = [np.frombuffer(digest(records.encoded(int(row))), np.uint8) for row in rows]
        if np.array_equal(found, wanted):
            return rows
    known = {row.tobytes(): place for place, row in enumerate(digests(records, workers=workers))}
    places = np.array([known.get(row.tobytes(), -1) for row in wanted], np.int64)
    missing = rows[places < 0]
    if len(missing):
        keys = ", ".join(cache.samples().keys(missing[:3]))
        raise SpecMismatchError(
            f"{len(missing)} of {len(rows)} sampled images of {cache.path} are not in "
            f"{records.path}, the first by key: {keys}; give the records that the cache was made "
            f"from ({cache.spec.dataset.name})"
        )
    return places


def _recomputed(
    cache: Cache,
    records: Records,
    embedder: Embedder,
    centers: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
) -> Iterator[tuple[View, int, int, npt.NDArray[np.float64], SparseTargets]]:
    """View, row, place in the records, logits float64 [C] and stored targets of each sample."""
    spec = cache.spec
    shards, loaded = rows // spec.shard_samples, -1
    size = max(1, min(64, BATCH_LOGITS // spec.num_classes))
    stored: dict[View, SparseTargets] = {}
    with progress("recompute", len(rows), "images") as advance:
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            images = np.stack([records.image(int(place)) for place in places[part]])
            logits = {
                view: _logits(embeddings, centers, labels[rows[part]], spec)
                for view, embeddings in embedder.start(images, spec.views)().items()
            }
            for i, (row, place, shard) in enumerate(
                zip(rows[part].tolist(), places[part].tolist(), shards[part].tolist(), strict=True)
            ):
                if shard != loaded:
                    stored = {view: cache.read_shard(shard, view) for view in spec.views}
                    loaded = shard
                for view in spec.views:
                    sample = row - spec.shard_rows(shard).start
                    one = stored[view].slice(range(sample, sample + 1))
                    yield view, row, place, logits[view][i].astype(np.float64), one
                advance()


def _logits(
    embeddings: npt.NDArray[np.float32],
    centers: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    spec: CacheSpec,
) -> npt.NDArray[np.float32]:
    """z = scale * (cos - margin * [class = label]), float32 [B, C]."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ centers.T
    cosines[np.arange(len(labels)), labels] -= spec.margin
    return np.asarray(spec.scale * cosines, np.float32)
