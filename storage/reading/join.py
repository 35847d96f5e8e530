"""Finds the rows of a cache that belong to the images of a data set, by their content."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from gkd.storage.cache.reader import Cache, Samples
from gkd.storage.errors import SpecMismatchError

if TYPE_CHECKING:
    from gkd.storage.records.open import Records

_EXAMPLES = 3
_ABSENT = -1
SKIPPED = -1


@dataclass(frozen=True)
class Join:
    """How a data set's images and classes belong to a cache's.

    rows         int64 [M], row of the cache for each image; ``SKIPPED`` where it has no targets
    classes      uint32 [C], number in the data set of each class of the cache; None where the
                 numbers are the same
    num_classes  of both together: the data set's, and the cache's that the data set lacks after
                 them
    unmatched    images that the cache does not know, left out on request
    """

    rows: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint32] | None
    num_classes: int
    unmatched: int


def join(
    records: "Records",
    cache: Cache,
    *,
    digests: npt.NDArray[np.uint8],
    drop_unmatched: bool = False,
) -> Join:
    """Match the images of ``records`` with a cache, by ``digests`` uint8 [M, 16].

    Neither rows nor keys matter, so a reshuffled, re-keyed, re-packed or filtered copy of the same
    images joins. Of several rows with the same image the one of the same class is taken. An image
    that the cache was told to skip, known by its key, gets ``SKIPPED``, and with
    ``drop_unmatched`` so does every image that the cache does not know.

    Classes may be numbered otherwise than in the cache: where labels disagree, the numbering is
    learned from the joined images. It must be one to one and known for every class: classes that
    have no image here may be missing in the numbering of the records (a filtered image folder) but
    not have another number there. The records may have fewer classes than the cache, and with
    ``drop_unmatched`` more.

    Raises:
        CorruptRecordError: at an image that cannot be read and was not skipped.
        SpecMismatchError: where images are not in the cache, where the records have more classes,
            or where their numbering cannot be learned.
    """
    if records.num_classes > cache.spec.num_classes and not drop_unmatched:
        raise SpecMismatchError(
            f"{records.path} has {records.num_classes} classes, the cache {cache.path} "
            f"{cache.spec.num_classes}; use the records that the cache was made from "
            f"({cache.spec.dataset.name}), cache again, or leave out what the cache does not know "
            "with --drop-unmatched"
        )
    samples = cache.samples()
    known = np.flatnonzero(samples.present)
    if not len(known):
        raise SpecMismatchError(
            f"the cache {cache.path} skipped all of its {len(samples)} samples; cache again from "
            "records that can be read"
        )
    labels, known_digests = records.labels, samples.digests[known]
    places = match(digests, labels, known_digests, samples.labels[known])
    absent = places == _ABSENT
    unreadable = absent & ~digests.any(axis=1)
    unknown = _not_skipped(records, samples, unreadable if drop_unmatched else absent)
    for row in unknown[unreadable[unknown]].tolist():
        records.encoded(row)
    if len(unknown) and not drop_unmatched:
        _refuse_unknown(records, cache, samples, unknown)
    joined = np.flatnonzero(places != _ABSENT)
    if not len(joined):
        raise SpecMismatchError(
            f"none of the {len(records)} images of {records.path} has targets in the cache "
            f"{cache.path}; use the records that it was made from ({cache.spec.dataset.name})"
        )
    classes = None
    if (samples.labels[known[places[joined]]] != labels[joined]).any():
        unique = _unique(known_digests)
        sure = joined[unique[places[joined]]]
        labels_there = samples.labels[known[places[sure]]]
        classes = _numbering(records, cache, sure, labels_there, drop_unmatched=drop_unmatched)
        # Among equal images of several classes the right one is known only now.
        numbered = classes[samples.labels[known]]
        places = match(digests, labels, known_digests, numbered)
        _require_numbered(records, cache, joined, numbered[places[joined]])
    return Join(
        np.where(places == _ABSENT, SKIPPED, known[places]),
        None if classes is None else classes.astype(np.uint32),
        max(records.num_classes, cache.spec.num_classes),
        int((places == _ABSENT).sum()) if drop_unmatched else 0,
    )


def _not_skipped(
    records: "Records", samples: Samples, absent: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Rows of those images, of ``absent`` [N], that the cache was not told to skip."""
    skipped = set(samples.keys(np.flatnonzero(~samples.present)))
    rows = [row for row in np.flatnonzero(absent).tolist() if records.key(row) not in skipped]
    return np.array(rows, np.int64)


def _refuse_unknown(
    records: "Records", cache: Cache, samples: Samples, unknown: npt.NDArray[np.int64]
) -> NoReturn:
    skipped = int((~samples.present).sum())
    note = f" ({skipped} were skipped when it was made)" if skipped else ""
    raise SpecMismatchError(
        f"{len(unknown)} of {len(records)} images of {records.path} are not in the cache "
        f"{cache.path}{note}, the first: {_list(records.where(row) for row in _few(unknown))}; "
        f"use the records that it was made from ({cache.spec.dataset.name}), cache again, or "
        "leave them out with --drop-unmatched"
    )


def _unique(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which of ``digests`` [N, 16] occur once, bool [N]."""
    words = _words(digests)
    order = np.lexsort((words[:, 1], words[:, 0]))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    unique = np.ones(len(digests), bool)
    unique[order[1:][same]] = False
    unique[order[:-1][same]] = False
    return unique


def _numbering(
    records: "Records",
    cache: Cache,
    rows: npt.NDArray[np.int64],
    cache_labels: npt.NDArray[np.int64],
    *,
    drop_unmatched: bool,
) -> npt.NDArray[np.int64]:
    """Number in the records of each class of the cache, int64 [C].

    Learned from images ``rows`` of the records, which have ``cache_labels`` in the cache. Classes
    without an image on one side may be any without one on the other where such images are dropped.
    """
    ours = records.labels[rows]
    pairs = np.unique(np.stack([cache_labels, ours], 1), axis=0)
    for side, (name, other) in enumerate([("the cache", "the records"), ("the records", "it")]):
        values, counts = np.unique(pairs[:, side], return_counts=True)
        if (counts > 1).any():
            several = int(values[counts > 1][0])
            numbers = pairs[pairs[:, side] == several, 1 - side].tolist()
            raise SpecMismatchError(
                f"{_differing(records, cache, rows, cache_labels)}; no numbering maps one to the "
                f"other: class {several} of {name} is {' and '.join(map(str, numbers[:_EXAMPLES]))}"
                f" in {other}{_NUMBERING_REMEDY}"
            )
    classes = np.full(cache.spec.num_classes, _ABSENT, np.int64)
    classes[pairs[:, 0]] = pairs[:, 1]
    missing = np.flatnonzero(classes == _ABSENT)
    free = np.setdiff1d(np.arange(records.num_classes), pairs[:, 1])
    decided = drop_unmatched or (len(missing), len(free)) == (1, 1)
    if len(missing) and len(free) and not decided:
        raise SpecMismatchError(
            f"{_differing(records, cache, rows, cache_labels)}; {len(free)} classes of the records "
            f"have no image in the cache, the first: {_list(map(str, _few(free)))}, so which of "
            f"the cache's {len(missing)} others they are is not known{_NUMBERING_REMEDY}"
        )
    # Classes that only the cache has come after those of the records.
    beyond = np.arange(records.num_classes, records.num_classes + len(missing))
    classes[missing] = np.concatenate([free, beyond])[: len(missing)]
    return classes


_NUMBERING_REMEDY = "; use records with the numbering of the cache, or cache again"


def _require_numbered(
    records: "Records",
    cache: Cache,
    joined: npt.NDArray[np.int64],
    numbered: npt.NDArray[np.int64],
) -> None:
    """Refuse images whose class is not theirs by the numbering either."""
    wrong = numbered != records.labels[joined]
    if wrong.any():
        found = _differing(records, cache, joined[wrong], numbered[wrong])
        raise SpecMismatchError(f"{found} in the records' numbering{_NUMBERING_REMEDY}")


def _differing(
    records: "Records",
    cache: Cache,
    rows: npt.NDArray[np.int64],
    cache_labels: npt.NDArray[np.int64],
) -> str:
    differing = np.flatnonzero(records.labels[rows] != cache_labels)
    examples = (
        f"{records.where(int(rows[i]))} has label {records.labels[rows[i]]}, the cache "
        f"{cache_labels[i]}"
        for i in _few(differing)
    )
    return (
        f"{len(differing)} of {len(records)} images of {records.path} have other labels in the "
        f"cache {cache.path}: the class numbering differs, the first: {_list(examples)}"
    )


def match(
    wanted: npt.NDArray[np.uint8],
    wanted_labels: npt.NDArray[np.int64],
    known: npt.NDArray[np.uint8],
    known_labels: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Position in ``known`` [N, 16] of each of ``wanted`` [M, 16], -1 where there is none; int64.

    Of several with the same digest the first with the same label, else the first.
    """
    wanted_words, known_words = _words(wanted), _words(known)
    order = np.argsort(known_words[:, 0], kind="stable")
    heads = known_words[order, 0]
    starts = np.flatnonzero(np.concatenate([[True], heads[1:] != heads[:-1]])[: len(heads)])
    lengths = np.diff(starts, append=len(heads))
    distinct = heads[starts]

    # Searched in ascending order, the table is walked through instead of jumped about in.
    ascending = np.argsort(wanted_words[:, 0])
    run = np.empty(len(wanted), np.int64)
    run[ascending] = np.searchsorted(distinct, wanted_words[ascending, 0])
    hits = np.flatnonzero(run < len(distinct))
    hits = hits[distinct[run[hits]] == wanted_words[hits, 0]]

    # Every pair of equal first words: most runs are one long, duplicates make longer ones.
    counts = lengths[run[hits]]
    asked = np.repeat(hits, counts)
    within = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
    candidates = order[starts[run[asked]] + within]
    same = known_words[candidates, 1] == wanted_words[asked, 1]
    asked, candidates = asked[same], candidates[same]

    places = np.full(len(wanted), _ABSENT, np.int64)
    agree = known_labels[candidates] == wanted_labels[asked]
    for chosen in (np.ones(len(asked), bool), agree):
        # The last assignment stays, so the first candidate goes last.
        places[asked[chosen][::-1]] = candidates[chosen][::-1]
    return places


def _words(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64)


def _few(rows: npt.NDArray[np.int64]) -> list[int]:
    few: list[int] = rows[:_EXAMPLES].tolist()
    return few


def _list(examples: Iterable[str]) -> str:
    return "; ".join(examples)
