"""Whether preprocessing, centres and settings fit the teacher, measured before the long run.

Preprocessing is judged by pairs of images of one identity, which needs no centres: class means of
wrong preprocessing look right, because every image is part of its own mean. Of each pair

    score = (cosine of the two - mean cosine to images of others) / deviation of all the latter

and every candidate scores the same pairs, so that a difference is told by its own standard error:
swapped channels move a score by a few hundredths of it, and still show.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.centers.refine import own_and_nearest
from gkd.pipeline.embed import embed, join_batches, split_rows
from gkd.pipeline.embedding_store import SAMPLED_IMAGES
from gkd.pipeline.groups.partition import partition
from gkd.pipeline.settings import PartitionSettings
from gkd.pipeline.teacher.embedder import Embedder, faulty_rows
from gkd.storage.cache.spec import Preprocess, View, preprocess_preset
from gkd.storage.errors import CorruptRecordError, GkdError
from gkd.storage.records.base import Records, Subset
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.torchrun_env import log_rank0

SEED = 0
MOST_PAIRS, FEWEST_PAIRS, FEWEST_IMAGES = 128, 32, 32
BATCH = 64
# Shares of a run's forward passes that the checks may add, where the fewest are less.
PAIRS_SHARE, IMAGES_SHARE = 1 / 20, 1 / 40
PRESETS = tuple(
    preprocess_preset(name, bgr=bgr)
    for name in ("arcface", "imagenet", "raw")
    for bgr in (False, True)
)
FEWEST_PASSES = 2 * FEWEST_PAIRS * len(PRESETS)
UNREADABLE = (
    "calibration: the preprocessing was not checked, as too few of the images can be read; `gkd "
    "records verify` lists those that cannot"
)
NOT_CHECKED = (
    "calibration: the preprocessing was not checked, which takes "
    f"{FEWEST_PAIRS} identities of two images and {FEWEST_PASSES // 2} images in both views"
)
FIRST_ROUND = 4  # a candidate may leave after this part of the pairs
HOPELESS = 0.5  # where its mean score is below this part of the best one
# Standard errors by which another preset has to be better.
CLEARLY = 3.5
BLIND = 2.0  # a mean score below this is of no face recogniser
MOSTLY_SINGLE, MOSTLY_CUT, LEAST_ACCURACY = 0.9, 0.5, 0.5


@dataclass(frozen=True)
class PairScores:
    """How far images of one identity stand apart from those of two, as one preset shows them.

    genuine, impostor  mean cosine of two images of one identity, of two identities
    scores             float64 [n], of each pair, in standard deviations of the impostors' cosines
    """

    preprocess: Preprocess
    genuine: float
    impostor: float
    scores: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    def __str__(self) -> str:
        return (
            f"{self.genuine:.3f} within an identity, {self.impostor:.3f} between two: "
            f"{self.mean:.2f} deviations apart"
        )


@dataclass(frozen=True)
class PresetCheck:
    """The given preprocessing's scores, and those of the best of all candidates.

    ``gain`` is the best one's mean advantage on the same pairs, ``error`` its standard error.
    """

    given: PairScores
    best: PairScores
    gain: float
    error: float

    @property
    def pairs(self) -> int:
        """How many pairs were scored."""
        return len(self.given.scores)

    @property
    def doubtful(self) -> bool:
        """Whether another preset is clearly better."""
        return self.gain > CLEARLY * self.error


@dataclass(frozen=True)
class GroupCheck:
    """What the settings make of a sample: cosines, and primary groups.

    own, nearest  float32 [n], cosine to the own centre and to the nearest other one
    sizes         int64 [n], classes of each group
    truncated     share of the groups that ``max_group`` cut
    """

    own: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.int64]
    truncated: float

    @property
    def accuracy(self) -> float:
        """Share of the images whose own centre is the nearest."""
        return float((self.own > self.nearest).mean())

    @property
    def single(self) -> float:
        """Share of the groups that are one class."""
        return float((self.sizes == 1).mean())


def pairs_to_score(labels: npt.NDArray[np.int64], passes: int) -> npt.NDArray[np.int64]:
    """Rows [n, 2] of two images of each of n identities, for a run of so many forward passes.

    At most ``MOST_PAIRS``, and as many as add ``PAIRS_SHARE`` to the run when all presets score
    them, but ``FEWEST_PAIRS``. None where so many would more than double the run, or where too few
    identities have two images.
    """
    order = np.argsort(labels, kind="stable")
    classes, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    several = np.flatnonzero((sizes > 1) & (classes >= 0))
    affordable = max(FEWEST_PAIRS, int(passes * PAIRS_SHARE) // (2 * len(PRESETS)))
    count = min(MOST_PAIRS, affordable, len(several))
    if count < FEWEST_PAIRS or passes < FEWEST_PASSES:
        return np.empty((0, 2), np.int64)
    rng = np.random.default_rng(SEED)
    chosen = rng.choice(several, count, replace=False)
    places = [starts[c] + rng.choice(sizes[c], 2, replace=False) for c in chosen]
    return np.asarray(order[np.array(places)], np.int64)


def sample_images(
    records: Records, embedder: Embedder, views: Sequence[View], *, workers: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows [n] of a random sample and their embeddings [n, D] in the first of ``views``.

    At most ``SAMPLED_IMAGES``, and ``IMAGES_SHARE`` of a run of all images in all views, but
    ``FEWEST_IMAGES`` where there are so many.
    """
    known = np.flatnonzero(records.labels >= 0)
    affordable = max(FEWEST_IMAGES, int(len(records) * len(views) * IMAGES_SHARE))
    count = min(SAMPLED_IMAGES, affordable, len(known))
    rows = np.sort(np.random.default_rng(SEED).choice(known, count, replace=False))
    sample, parts = Subset(records, rows), split_rows(range(count), BATCH)
    batches = embed(sample, parts, embedder, views[:1], workers=workers, skip_corrupt=True)
    whole = join_batches(list(batches))
    return rows[whole.kept], whole.embeddings[views[0]]


def check_presets(
    records: Records, embedder: Embedder, pairs: npt.NDArray[np.int64], *, workers: int
) -> PresetCheck | None:
    """Score rows [n, 2] by the embedder's preprocessing and by every preset.

    None where too few of the images can be read.

    Raises:
        GkdError: where the embedder's own preprocessing gives embeddings without direction.
    """
    faces, read = read_faces(records, pairs.ravel(), workers=workers)
    whole = read.reshape(-1, 2).all(1)
    faces = faces[np.repeat(whole, 2)[read]]
    if whole.sum() < FEWEST_PAIRS:
        return None
    given = embedder.preprocess
    candidates = [given, *(preset for preset in PRESETS if preset != given)]
    first = 2 * max(2, len(faces) // 2 // FIRST_ROUND)
    begun = {}
    for preset in candidates:
        found = _embed(embedder, preset, faces[:first], required=preset == given)
        if found is not None:
            begun[preset] = found
    means = {preset: score(preset, found).mean for preset, found in begun.items()}
    least = HOPELESS * max(means.values())
    scored = []
    for preset, found in begun.items():
        if preset == given or means[preset] >= least:
            rest = _embed(embedder, preset, faces[first:], required=preset == given)
            if rest is not None:
                scored.append(score(preset, np.concatenate([found, rest])))
    return compare(scored[0], scored)


def compare(given: PairScores, candidates: Sequence[PairScores]) -> PresetCheck:
    """The given scores against the best of several, all of the same pairs."""
    best = max(candidates, key=lambda each: each.mean)
    gains = best.scores - given.scores
    error = float(gains.std(ddof=1)) / len(gains) ** 0.5
    return PresetCheck(given, best, float(gains.mean()), error)


def read_faces(
    records: Records, rows: npt.NDArray[np.int64], *, workers: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Faces uint8 [m, 112, 112, 3] of those rows [n] that can be read, and which: bool [n]."""

    def face(row: int) -> npt.NDArray[np.uint8] | None:
        try:
            return records.image(row)
        except CorruptRecordError:
            return None  # the run itself says so, or leaves it out

    faces = list(ordered_map(face, rows.tolist(), workers=workers))
    found = [each for each in faces if each is not None]
    read = np.array([each is not None for each in faces])
    return np.stack(found) if found else np.empty((0, 112, 112, 3), np.uint8), read


def _embed(
    embedder: Embedder, preset: Preprocess, faces: npt.NDArray[np.uint8], *, required: bool
) -> npt.NDArray[np.float64] | None:
    """L2-normalised embeddings [n, D] by another preprocessing, None where some have no direction.

    Raises:
        GkdError: instead of None, where ``required``.
    """
    other = copy.copy(embedder)  # the same network; weights are not loaded again
    other.preprocess = preset
    parts = [other(faces[b.start : b.stop]) for b in split_rows(range(len(faces)), BATCH)]
    embeddings = np.concatenate(parts)
    faulty = faulty_rows(embeddings)
    if len(faulty) and required:
        raise GkdError(
            f"{embedder.name}: NaN, infinite or zero embeddings of {len(faulty)} of {len(faces)} "
            f"images of a first sample; computed in {embedder.precision}: try --precision float32, "
            "and check the weights and the preprocessing"
        )
    if len(faulty):
        return None
    exact = embeddings.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return exact


def score(preset: Preprocess, embeddings: npt.NDArray[np.float64]) -> PairScores:
    """Scores of pairs that stand one after the other: unit embeddings [2n, D] of n identities."""
    cosines = embeddings @ embeddings.T
    pairs = len(embeddings) // 2
    places = np.arange(2 * pairs) // 2
    others = places[:, None] != places
    genuine = cosines[np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2)]
    impostors = cosines[others].reshape(pairs, -1)  # of both images of each pair
    deviation = max(float(impostors.std()), np.finfo(np.float32).eps)
    scores = (genuine - impostors.mean(1)) / deviation
    return PairScores(preset, float(genuine.mean()), float(impostors.mean()), scores)


def check_groups(
    embeddings: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    centers: Tensor,
    settings: PartitionSettings,
) -> GroupCheck:
    """Cosines and groups of embeddings [n, D] of classes ``labels`` [n], without draws."""
    unit = functional.normalize(torch.from_numpy(embeddings).to(centers.device), dim=1)
    classes = torch.from_numpy(labels).to(centers.device)
    own, nearest = own_and_nearest(unit, classes, centers)
    plain = replace(settings, draws=None)
    groups = partition(torch.from_numpy(embeddings), classes, centers, plain)
    return GroupCheck(
        own.cpu().numpy(),
        nearest.cpu().numpy(),
        groups.targets.sizes,
        float(groups.truncated.mean()),
    )


def describe_preset(check: PresetCheck) -> list[str]:
    """What a check found, a line each; a warning where another preprocessing fits better."""
    given, best = check.given, check.best
    lines = [f"calibration: cosines {given} ({check.pairs} pairs, {_options(given.preprocess)})"]
    if best is not given and not check.doubtful:
        lines[0] += (
            f"; {_options(best.preprocess)} seems better by {check.gain:.2f} +- {check.error:.2f}, "
            "which so few pairs cannot tell from chance"
        )
    if check.doubtful:
        lines.append(
            f"warning: {_options(given.preprocess)} looks wrong for this teacher. On the same "
            f"pairs {_options(best.preprocess)} gives cosines {best}, better by {check.gain:.2f} "
            f"+- {check.error:.2f}; unless the teacher's makers say otherwise, stop and give "
            f"{_options(best.preprocess)}"
        )
    if best.mean < BLIND:
        lines.append(
            "warning: by no preprocessing does this teacher tell identities apart; are these its "
            "trained weights, and the labels those of the images?"
        )
    return lines


def describe_groups(
    check: GroupCheck, settings: PartitionSettings, *, own_means: bool
) -> list[str]:
    """What the groups are like, a line each; warnings where they can hardly teach.

    ``own_means`` are centres that the images themselves were averaged into.
    """
    images = len(check.sizes)
    own, nearest, sizes = check.own, check.nearest, check.sizes
    of_which = ", themselves part of it" if own_means else ""
    lines = [
        f"calibration: cosine to the own centre{of_which} {own.mean():.3f} (median "
        f"{np.median(own):.3f}), to the nearest other {nearest.mean():.3f} "
        f"({np.median(nearest):.3f}), own is nearest {check.accuracy:.1%}; groups of "
        f"{np.median(sizes):,.0f} classes (median; mean {sizes.mean():,.0f}, 95 % within "
        f"{np.quantile(sizes, 0.95):,.0f}), {check.single:.1%} of one class, "
        f"{check.truncated:.1%} cut ({images:,} images)"
    ]
    if check.accuracy < LEAST_ACCURACY:
        lines.append(
            f"warning: for only {check.accuracy:.1%} of the images the centre of their label is "
            "the nearest; that comes of centres in another numbering of the identities, of another "
            "teacher, or of the wrong --preprocess"
        )
    if check.single >= MOSTLY_SINGLE:
        lines.append(
            f"warning: {check.single:.1%} of the groups are the label alone, which teaches little; "
            + _other_than_single(settings)
        )
    if check.truncated >= MOSTLY_CUT:
        lines.append(
            f"warning: --max-group {settings.max_group:,} cuts {check.truncated:.1%} of the "
            "groups; raise it, or lower --group-temperature (now "
            f"{settings.group_temperature:g}) or --threshold (now {settings.threshold:g})"
            + ("; or take --draws 64 in their place" if settings.draws is None else "")
        )
    return lines


def _other_than_single(settings: PartitionSettings) -> str:
    raised = f"raise --group-temperature (now {settings.group_temperature:g})"
    if settings.draws is None:
        return f"{raised}, or take --draws 64"
    if settings.draws_from_group:
        return f"all draws are from them: {raised}, or take --draw-from all"
    return f"train from the draws, as train-student does unless told otherwise, or {raised}"


def check_preprocessing(
    records: Records, embedder: Embedder, views: Sequence[View], *, workers: int
) -> PresetCheck | None:
    """Check the preprocessing of a run of all ``views`` and print the findings on stderr.

    None, which is told as well, where the run is too short for it or has too few pairs.

    Raises:
        GkdError: where the embeddings of the sample have no direction.
    """
    pairs = pairs_to_score(records.labels, len(records) * len(views))
    check = check_presets(records, embedder, pairs, workers=workers) if len(pairs) else None
    unchecked = [UNREADABLE if len(pairs) else NOT_CHECKED]
    for line in unchecked if check is None else describe_preset(check):
        log_rank0(line)
    return check


def report_group_sizes(
    embeddings: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    centers: Tensor,
    settings: PartitionSettings,
    *,
    own_means: bool,
) -> None:
    """Check the groups of a sample and print the findings on stderr."""
    check = check_groups(embeddings, labels, centers, settings)
    for line in describe_groups(check, settings, own_means=own_means):
        log_rank0(line)


def _options(preset: Preprocess) -> str:
    return f"--preprocess {preset.name}" + " --bgr" * preset.bgr
