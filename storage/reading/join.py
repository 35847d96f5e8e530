"""Finds the rows of a cache that belong to the images of a data set, by their content."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.reader import Cache, Samples
from gkd.storage.errors import SpecMismatchError
from gkd.storage.records.base import Records
from gkd.storage.util.text import first_few

_EXAMPLES = 3
_ABSENT = -1
SKIPPED = -1
_NUMBERING_REMEDY = "use records with the numbering of the cache, or cache again"


@dataclass(frozen=True)
class Join:
    """How a data set's images and classes map to a cache's.

    rows         int64 [M], row of the cache for each image; ``SKIPPED`` if it has no targets
    classes      uint32 [C], number in the data set of each class of the cache; None if the
                 numbers are the same
    num_classes  of both together: the data set's, then those that only the cache has
    unmatched    images that the cache does not know, left out on request
    """

    rows: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint32] | None
    num_classes: int
    unmatched: int


def join(
    records: Records,
    cache: Cache,
    *,
    digests: npt.NDArray[np.uint8],
    drop_unmatched: bool = False,
) -> Join:
    """Match the images of ``records`` with a cache, by ``digests`` uint8 [M, 16].

    Rows and keys do not matter, so a reshuffled, re-keyed, re-packed or filtered copy of the same
    images joins. Of several rows with the same image that of the same class is taken. An image
    that the cache skipped, known by its key, gets ``SKIPPED``, and with ``drop_unmatched`` so does
    every image that the cache does not know.

    If labels differ from the cache's, the class numbering is inferred from the joined images. It
    must be one to one and determined for every class: classes that have no image here may be
    missing in the numbering of the records (a filtered image folder), but not have other numbers
    there. The records may have fewer classes than the cache, and with ``drop_unmatched`` more.

    Raises:
        CorruptRecordError: at an image that cannot be read and was not skipped.
        SpecMismatchError: if images are not in the cache, if the records have more classes, or if
            their numbering cannot be inferred.
    """
    if records.num_classes > cache.spec.num_classes and not drop_unmatched:
        raise SpecMismatchError(
            f"{records.path} has {records.num_classes} classes, the cache {cache.path} "
            f"{cache.spec.num_classes}",
            remedy=f"use the records that the cache was made from ({cache.spec.dataset.name}), "
            "cache again, or leave out what the cache does not know with --drop-unmatched",
        )
    samples = cache.samples()
    known = np.flatnonzero(samples.present)
    if not len(known):
        raise SpecMismatchError(
            f"the cache {cache.path} skipped all of its {len(samples)} samples",
            remedy="cache again from records that can be read",
        )
    labels, known_digests = records.labels, samples.digests[known]
    matches = match(digests, labels, known_digests, samples.labels[known])
    absent = matches == _ABSENT
    unreadable = absent & ~digests.any(axis=1)
    unknown = _not_skipped(records, samples, unreadable if drop_unmatched else absent)
    for row in unknown[unreadable[unknown]].tolist():
        records.encoded(row)  # raises what is wrong with it
    if len(unknown) and not drop_unmatched:
        _refuse_unknown(records, cache, samples, unknown)
    joined = np.flatnonzero(matches != _ABSENT)
    if not len(joined):
        raise SpecMismatchError(
            f"none of the {len(records)} images of {records.path} has targets in the cache "
            f"{cache.path}",
            remedy=f"use the records that it was made from ({cache.spec.dataset.name})",
        )
    classes = None
    if (samples.labels[known[matches[joined]]] != labels[joined]).any():
        unambiguous = joined[_unique(known_digests)[matches[joined]]]
        cache_labels = samples.labels[known[matches[unambiguous]]]
        classes = _numbering(records, cache, unambiguous, cache_labels, drop_unmatched)
        # Only now the right one of equal images of several classes is known.
        numbered = classes[samples.labels[known]]
        matches = match(digests, labels, known_digests, numbered)
        found = numbered[matches[joined]]
        wrong = found != labels[joined]
        if wrong.any():
            difference = _describe_labels(records, cache, joined[wrong], found[wrong])
            raise SpecMismatchError(
                f"{difference} in the records' numbering", remedy=_NUMBERING_REMEDY
            )
    absent = matches == _ABSENT
    return Join(
        np.where(absent, SKIPPED, known[matches]),
        None if classes is None else classes.astype(np.uint32),
        max(records.num_classes, cache.spec.num_classes),
        int(absent.sum()) if drop_unmatched else 0,
    )


def _not_skipped(
    records: Records, samples: Samples, absent: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Rows of the images, of those in ``absent`` [N], that the cache did not skip."""
    skipped = set(samples.keys(np.flatnonzero(~samples.present)))
    rows = [row for row in np.flatnonzero(absent).tolist() if records.key(row) not in skipped]
    return np.array(rows, np.int64)


def _refuse_unknown(
    records: Records, cache: Cache, samples: Samples, unknown: npt.NDArray[np.int64]
) -> NoReturn:
    skipped = int((~samples.present).sum())
    note = f" ({skipped} were skipped when it was made)" if skipped else ""
    examples = _first_few((records.where(row) for row in unknown.tolist()), len(unknown))
    raise SpecMismatchError(
        f"{len(unknown)} of {len(records)} images of {records.path} are not in the cache "
        f"{cache.path}{note}: {examples}",
        remedy=f"use the records that it was made from ({cache.spec.dataset.name}), cache again, "
        "or leave them out with --drop-unmatched",
    )


def _unique(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which of ``digests`` [N, 16] occur once, bool [N]."""
    _, inverse, counts = np.unique(
        digests.view("V16").reshape(-1), return_inverse=True, return_counts=True
    )
    unique: npt.NDArray[np.bool_] = counts[inverse.reshape(-1)] == 1
    return unique


def _numbering(
    records: Records,
    cache: Cache,
    rows: npt.NDArray[np.int64],
    cache_labels: npt.NDArray[np.int64],
    drop_unmatched: bool,
) -> npt.NDArray[np.int64]:
    """Number in the records of each class of the cache, int64 [C].

    Inferred from the images ``rows`` of the records, which have ``cache_labels`` in the cache. If
    unmatched images are dropped, classes without an image on one side may be paired arbitrarily
    with those without one on the other.
    """
    pairs = np.unique(np.stack([cache_labels, records.labels[rows]], 1), axis=0)
    for side, (name, other) in enumerate([("the cache", "the records"), ("the records", "it")]):
        values, counts = np.unique(pairs[:, side], return_counts=True)
        if (counts > 1).any():
            several = int(values[counts > 1][0])
            numbers = pairs[pairs[:, side] == several, 1 - side].tolist()
            raise SpecMismatchError(
                f"{_describe_labels(records, cache, rows, cache_labels)}; no numbering maps one to "
                f"the other: class {several} of {name} is "
                f"{' and '.join(map(str, numbers[:_EXAMPLES]))} in {other}",
                remedy=_NUMBERING_REMEDY,
            )
    classes = np.full(cache.spec.num_classes, _ABSENT, np.int64)
    classes[pairs[:, 0]] = pairs[:, 1]
    missing = np.flatnonzero(classes == _ABSENT)
    free = np.setdiff1d(np.arange(records.num_classes), pairs[:, 1])
    determined = drop_unmatched or (len(missing), len(free)) == (1, 1)
    if len(missing) and len(free) and not determined:
        raise SpecMismatchError(
            f"{_describe_labels(records, cache, rows, cache_labels)}; {len(free)} classes of the "
            f"records have no image in the cache: {first_few(free.tolist(), _EXAMPLES)}, so which "
            f"of the cache's {len(missing)} other classes they are is unknown",
            remedy=_NUMBERING_REMEDY,
        )
    # Classes that only the cache has follow those of the records.
    beyond = np.arange(records.num_classes, records.num_classes + len(missing))
    classes[missing] = np.concatenate([free, beyond])[: len(missing)]
    return classes


def _describe_labels(
    records: Records,
    cache: Cache,
    rows: npt.NDArray[np.int64],
    cache_labels: npt.NDArray[np.int64],
) -> str:
    differing = np.flatnonzero(records.labels[rows] != cache_labels)
    examples = (
        f"{records.where(int(rows[i]))} has label {records.labels[rows[i]]}, the cache "
        f"{cache_labels[i]}"
        for i in differing
    )
    return (
        f"{len(differing)} of {len(records)} images of {records.path} have other labels in the "
        f"cache {cache.path}: the class numbering differs: {_first_few(examples, len(differing))}"
    )


def _first_few(examples: Iterable[str], count: int) -> str:
    """The first few of ``count`` examples; the others are not computed."""
    return first_few(list(islice(examples, _EXAMPLES)), _EXAMPLES, count=count)


def match(
    wanted: npt.NDArray[np.uint8],
    wanted_labels: npt.NDArray[np.int64],
    known: npt.NDArray[np.uint8],
    known_labels: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Position in ``known`` [N, 16] of each of ``wanted`` [M, 16], int64, -1 for none.

    Of several with the same digest it is the first with the same label, else the first.
    """
    wanted_words, known_words = _words(wanted), _words(known)
    order = np.argsort(known_words[:, 0], kind="stable")
    heads = known_words[order, 0]
    starts = np.flatnonzero(np.concatenate([[True], heads[1:] != heads[:-1]])[: len(heads)])
    lengths = np.diff(starts, append=len(heads))
    distinct = heads[starts]

    # Searching in ascending order reads the table sequentially.
    ascending = np.argsort(wanted_words[:, 0])
    run = np.empty(len(wanted), np.int64)
    run[ascending] = np.searchsorted(distinct, wanted_words[ascending, 0])
    hits = np.flatnonzero(run < len(distinct))
    hits = hits[distinct[run[hits]] == wanted_words[hits, 0]]

    # Every pair with equal first words: a run has one, or more if there are duplicates.
    counts = lengths[run[hits]]
    pair_wanted = np.repeat(hits, counts)
    within = np.arange(len(pair_wanted)) - np.repeat(np.cumsum(counts) - counts, counts)
    pair_known = order[starts[run[pair_wanted]] + within]
    same = known_words[pair_known, 1] == wanted_words[pair_wanted, 1]
    pair_wanted, pair_known = pair_wanted[same], pair_known[same]

    found = np.full(len(wanted), _ABSENT, np.int64)
    same_label = known_labels[pair_known] == wanted_labels[pair_wanted]
    for chosen in (np.ones(len(pair_wanted), bool), same_label):
        # Of several assignments the last one counts, so they are made in reverse order.
        found[pair_wanted[chosen][::-1]] = pair_known[chosen][::-1]
    return found


def _words(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64)
