"""Whether preprocessing, centres and settings suit the teacher, measured before the long run.

Preprocessing is scored on pairs of images of one identity, which needs no centres: class means of
wrong preprocessing look right, because every image is part of its own mean. The score of a pair is

    d' = (cosine of the pair - mean cosine to images of others) / standard deviation of all of these

and every candidate is scored on the same pairs, so a difference is compared with its own standard
error: swapped channels change a score by a few hundredths of it, and are still detected.
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
from gkd.pipeline.checks.sample import SEED, embed_rows, random_rows
from gkd.pipeline.embed import split_rows
from gkd.pipeline.embedding_store import SAMPLED_IMAGES
from gkd.pipeline.groups.partition import partition
from gkd.pipeline.settings import PartitionSettings
from gkd.pipeline.teacher.embedder import Embedder, faulty_rows
from gkd.storage.cache.spec import Preprocess, View, preprocess_options, preprocess_preset
from gkd.storage.errors import CorruptRecordError, GkdError
from gkd.storage.records.base import Records
from gkd.storage.util.parallel import ordered_map
from gkd.storage.util.torchrun_env import log_rank0

MAX_PAIRS, MIN_PAIRS, MIN_IMAGES = 128, 32, 32
BATCH = 64
# The checks may add these shares to the forward passes of a run, above their minimum.
PAIRS_SHARE, IMAGES_SHARE = 1 / 20, 1 / 40
PRESETS = tuple(
    preprocess_preset(name, bgr=bgr)
    for name in ("arcface", "imagenet", "raw", "unit")
    for bgr in (False, True)
)
MIN_PASSES = 12 * MIN_PAIRS  # of a run; most candidates drop out early
FIRST_ROUND = 4  # a candidate may drop out after 1 / FIRST_ROUND of the pairs
HOPELESS = 0.5  # if its mean score is below this share of the best one
SIGNIFICANT = 3.5  # standard errors by which another preset has to be better
MIN_DISCRIMINATION = 2.0  # d' below which a network does not recognise faces
MAX_SINGLE, MAX_TRUNCATED, MIN_ACCURACY = 0.9, 0.5, 0.5


@dataclass(frozen=True)
class PairScores:
    """How well one preset separates images of one identity from those of two.

    genuine, impostor  mean cosine of two images of one identity, of two identities
    scores             float64 [n], d' of each pair
    """

    preprocess: Preprocess
    genuine: float
    impostor: float
    scores: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def options(self) -> str:
        """The options that choose this preprocessing."""
        return preprocess_options(self.preprocess)

    def __str__(self) -> str:
        return (
            f"{self.genuine:.3f} within an identity, {self.impostor:.3f} between identities: "
            f"d' = {self.mean:.2f}"
        )


@dataclass(frozen=True)
class PresetCheck:
    """Scores of the given preprocessing, and those of the best of all candidates.

    ``gain`` is the mean advantage of the best on the same pairs, ``error`` its standard error.
    """

    given: PairScores
    best: PairScores
    gain: float
    error: float

    @property
    def doubtful(self) -> bool:
        """Whether another preset is significantly better."""
        return self.gain > SIGNIFICANT * self.error


def check_preprocessing(
    records: Records, embedder: Embedder, views: Sequence[View], *, workers: int
) -> None:
    """Check the preprocessing of a run over all ``views``, if it is long enough; log the result.

    Raises:
        GkdError: if embeddings of the sample have no direction.
    """
    pairs = pairs_to_score(records.labels, len(records) * len(views))
    check = check_presets(records, embedder, pairs, workers=workers) if len(pairs) else None
    if check is not None:
        log_rank0("\n".join(describe_preset(check)))
        return
    reason = (
        "as too few of the images can be read; `gkd records verify` lists those that cannot"
        if len(pairs)
        else f"which requires {MIN_PAIRS} identities of two images and {MIN_PASSES // 2} images in "
        "both views"
    )
    log_rank0(f"calibration: the preprocessing was not checked, {reason}")


def sample_images(
    records: Records, embedder: Embedder, views: Sequence[View], *, workers: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows [n] of a random sample and their embeddings [n, D] in the first of ``views``.

    At most ``SAMPLED_IMAGES``, and at most ``IMAGES_SHARE`` of a run over all images in all views,
    but at least ``MIN_IMAGES`` if there are so many.
    """
    affordable = max(MIN_IMAGES, int(len(records) * len(views) * IMAGES_SHARE))
    rows = random_rows(records, min(SAMPLED_IMAGES, affordable))
    batch = embed_rows(records, rows, embedder, views[:1], batch_size=BATCH, workers=workers)
    return rows[batch.kept], batch.embeddings[views[0]]


def pairs_to_score(labels: npt.NDArray[np.int64], passes: int) -> npt.NDArray[np.int64]:
    """Rows [n, 2] of two images of each of n identities, for a run of so many forward passes.

    At most ``MAX_PAIRS``, and so many that scoring them by all presets adds ``PAIRS_SHARE`` to the
    run, but at least ``MIN_PAIRS``. None for a run of fewer than ``MIN_PASSES``, which these would
    about double, or if too few identities have two images.
    """
    order = np.argsort(labels, kind="stable")
    classes, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    several = np.flatnonzero((sizes > 1) & (classes >= 0))
    affordable = max(MIN_PAIRS, int(passes * PAIRS_SHARE) // (2 * len(PRESETS)))
    count = min(MAX_PAIRS, affordable, len(several))
    if count < MIN_PAIRS or passes < MIN_PASSES:
        return np.empty((0, 2), np.int64)
    rng = np.random.default_rng(SEED)
    chosen = rng.choice(several, count, replace=False)
    positions = [starts[c] + rng.choice(sizes[c], 2, replace=False) for c in chosen]
    return np.asarray(order[np.array(positions)], np.int64)


def check_presets(
    records: Records, embedder: Embedder, pairs: npt.NDArray[np.int64], *, workers: int
) -> PresetCheck | None:
    """Score rows [n, 2] by the embedder's preprocessing and by every preset.

    None if too few of the images can be read.

    Raises:
        GkdError: if the embedder's own preprocessing gives embeddings without direction.
    """
    faces, readable = read_faces(records, pairs.ravel(), workers=workers)
    complete = readable.reshape(-1, 2).all(1)
    faces = faces[np.repeat(complete, 2)[readable]]
    if complete.sum() < MIN_PAIRS:
        return None
    given = embedder.preprocess
    first = 2 * max(2, len(faces) // 2 // FIRST_ROUND)
    begun = {}
    for preset in dict.fromkeys((given, *PRESETS)):
        if (embeddings := _embed(embedder, preset, faces[:first])) is not None:
            begun[preset] = embeddings
    means = {preset: score(preset, embeddings).mean for preset, embeddings in begun.items()}
    scored = []
    for preset, embeddings in begun.items():
        if preset == given or means[preset] >= HOPELESS * max(means.values()):
            rest = _embed(embedder, preset, faces[first:])
            if rest is not None:
                scored.append(score(preset, np.concatenate([embeddings, rest])))
    return compare(scored[0], scored)


def compare(given: PairScores, candidates: Sequence[PairScores]) -> PresetCheck:
    """The given scores against the best of several, all of the same pairs."""
    best = max(candidates, key=lambda scores: scores.mean)
    gains = best.scores - given.scores
    error = float(gains.std(ddof=1)) / len(gains) ** 0.5
    return PresetCheck(given, best, float(gains.mean()), error)


def read_faces(
    records: Records, rows: npt.NDArray[np.int64], *, workers: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Faces uint8 [m, 112, 112, 3] of the readable ones of ``rows`` [n], and which: bool [n]."""

    def read(row: int) -> npt.NDArray[np.uint8] | None:
        try:
            return records.image(row)
        except CorruptRecordError:
            return None  # the run itself reports or skips it

    faces = list(ordered_map(read, rows.tolist(), workers=workers))
    found = [face for face in faces if face is not None]
    readable = np.array([face is not None for face in faces])
    return np.stack(found) if found else np.empty((0, 112, 112, 3), np.uint8), readable


def _embed(
    embedder: Embedder, preset: Preprocess, faces: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64] | None:
    """L2-normalised embeddings [n, D] by any preprocessing, None if some have no direction.

    Raises:
        GkdError: instead of None, if the preprocessing is the embedder's own.
    """
    other = copy.copy(embedder)  # the same network; weights are not loaded again
    other.preprocess = preset
    parts = [other(faces[rows.start : rows.stop]) for rows in split_rows(range(len(faces)), BATCH)]
    embeddings = np.concatenate(parts)
    faulty = faulty_rows(embeddings)
    if len(faulty) and preset == embedder.preprocess:
        raise GkdError(
            f"{embedder.name}: NaN, infinite or zero embeddings of {len(faulty)} of {len(faces)} "
            f"images of a first sample, computed in {embedder.precision}",
            remedy="try --precision float32, and check the weights and the preprocessing",
        )
    if len(faulty):
        return None
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit


def score(preset: Preprocess, embeddings: npt.NDArray[np.float64]) -> PairScores:
    """Scores of n consecutive pairs, one an identity: unit embeddings [2n, D]."""
    cosines = embeddings @ embeddings.T
    pairs = len(embeddings) // 2
    identities = np.arange(2 * pairs) // 2
    others = identities[:, None] != identities
    genuine = cosines[np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2)]
    impostors = cosines[others].reshape(pairs, -1)  # of both images of each pair
    deviation = max(float(impostors.std()), np.finfo(np.float32).eps)
    scores = (genuine - impostors.mean(1)) / deviation
    return PairScores(preset, float(genuine.mean()), float(impostors.mean()), scores)


def describe_preset(check: PresetCheck) -> list[str]:
    """The result of a check as lines, with a warning if another preprocessing fits better."""
    given, best = check.given, check.best
    gain = f"{check.gain:.2f} +- {check.error:.2f}"
    lines = [f"calibration: cosines {given} ({len(given.scores)} pairs, {given.options})"]
    if check.doubtful:
        lines.append(
            f"warning: {given.options} looks wrong for this teacher. On the same pairs "
            f"{best.options} gives cosines {best}, better by {gain}; unless the teacher's "
            f"documentation says otherwise, stop and use {best.options}"
        )
    elif best is not given:
        lines[0] += (
            f"; {best.options} seems better by {gain}, which is not significant with so few pairs"
        )
    if best.mean < MIN_DISCRIMINATION:
        lines.append(
            "warning: this teacher does not separate identities with any preprocessing; are these "
            "its trained weights, and do the labels belong to the images?"
        )
    return lines


def report_group_sizes(
    embeddings: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    centers: Tensor,
    settings: PartitionSettings,
    *,
    own_means: bool,
) -> None:
    """Log cosines and primary groups of embeddings [n, D] of classes ``labels`` [n].

    Warnings follow if centres do not fit or groups hardly teach. ``own_means`` are centres that
    these images are part of.
    """
    unit = functional.normalize(torch.from_numpy(embeddings).to(centers.device), dim=1)
    classes = torch.from_numpy(labels).to(centers.device)
    own, nearest = (each.cpu().numpy() for each in own_and_nearest(unit, classes, centers))
    without_draws = replace(settings, draws=None)
    groups = partition(torch.from_numpy(embeddings), classes, centers, without_draws)
    sizes, truncated = groups.targets.sizes, float(groups.truncated.mean())
    accuracy, single = float((own > nearest).mean()), float((sizes == 1).mean())
    part_of = " (a mean that includes the image)" if own_means else ""
    temperature = f"--group-temperature (now {settings.group_temperature:g})"
    lines = [
        f"calibration, {len(sizes):,} images: cosine to the own centre{part_of}: mean "
        f"{own.mean():.3f}, median {np.median(own):.3f}; to the nearest other: mean "
        f"{nearest.mean():.3f}, median {np.median(nearest):.3f}; own centre nearest: "
        f"{accuracy:.1%}; classes in a primary group: median {np.median(sizes):,.0f}, mean "
        f"{sizes.mean():,.1f}, 95th percentile {np.quantile(sizes, 0.95):,.0f}; groups of one "
        f"class: {single:.1%}; truncated groups: {truncated:.1%}"
    ]
    if accuracy < MIN_ACCURACY:
        lines.append(
            f"warning: for only {accuracy:.1%} of the images the centre of their label is "
            "the nearest; the centres may number the identities differently or belong to another "
            "teacher, or --preprocess may be wrong"
        )
    if single >= MAX_SINGLE:
        if settings.draws is None:
            remedy = "use --draws 64"
        elif settings.draws_from_group:
            remedy = "use --draw-from all, as all draws are from these groups"
        else:
            remedy = "train from the draws, as train-student does by default"
        lines.append(
            f"warning: {single:.1%} of the groups contain only the label, which teaches "
            f"little; raise {temperature}, or {remedy}"
        )
    if truncated >= MAX_TRUNCATED:
        lines.append(
            f"warning: --max-group {settings.max_group:,} truncates {truncated:.1%} of the "
            f"groups; raise it, or lower {temperature} or --threshold (now "
            f"{settings.threshold:g})" + "; or use --draws 64 instead" * (settings.draws is None)
        )
    log_rank0("\n".join(lines))
