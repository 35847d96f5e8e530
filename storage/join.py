"""Finds the rows of a cache that belong to the images of a data set, by their content."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gkd.storage.cache import Cache
from gkd.storage.errors import SpecMismatchError

if TYPE_CHECKING:
    from gkd.storage.records import Records

_EXAMPLES = 3
_ABSENT = -1
SKIPPED = -1


def join(
    records: "Records", cache: Cache, *, digests: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Row of the cache for each image of ``records``, by ``digests`` uint8 [M, 16]; int64 [M].

    Neither rows nor keys matter, so a reshuffled, re-keyed or filtered copy of the same images
    joins. Of several rows with the same image the one with the same label is taken. An image that
    the cache was told to skip, known by its key, gets ``SKIPPED``.

    Raises:
        CorruptRecordError: at an image that cannot be read and was not skipped.
        SpecMismatchError: where the number of classes differs, where images are not in the cache,
            or where labels disagree.
    """
    if records.num_classes != cache.spec.num_classes:
        raise SpecMismatchError(
            f"{records.path} has {records.num_classes} classes, the cache {cache.path} "
            f"{cache.spec.num_classes}; use the records that the cache was made from "
            f"({cache.spec.dataset.name}), or cache again"
        )
    samples = cache.samples()
    known = np.flatnonzero(samples.present)
    if not len(known):
        raise SpecMismatchError(
            f"the cache {cache.path} skipped all of its {len(samples)} samples; cache again from "
            "records that can be read"
        )
    places = match(digests, records.labels, samples.digests[known], samples.labels[known])

    absent = np.flatnonzero(places == _ABSENT)
    skipped = set(samples.keys(np.flatnonzero(~samples.present)))
    unknown = absent[[records.key(row) not in skipped for row in absent.tolist()]]
    if len(unknown):
        for row in unknown[~digests[unknown].any(axis=1)].tolist():
            records.encoded(row)
        note = f" ({len(skipped)} were skipped when it was made)" if skipped else ""
        raise SpecMismatchError(
            f"{len(unknown)} of {len(records)} images of {records.path} are not in the cache "
            f"{cache.path}{note}, the first: {_list(records.where(row) for row in _few(unknown))}; "
            f"use the records that it was made from ({cache.spec.dataset.name}), or cache again"
        )
    rows = np.where(places == _ABSENT, SKIPPED, known[places])
    labels = samples.labels[rows]
    differing = np.flatnonzero((labels != records.labels) & (rows != SKIPPED))
    if len(differing):
        examples = (
            f"{records.where(row)} has label {records.labels[row]}, the cache {labels[row]}"
            for row in _few(differing)
        )
        raise SpecMismatchError(
            f"{len(differing)} of {len(records)} images of {records.path} have other labels in "
            f"the cache {cache.path}: the class numbering differs, the first: {_list(examples)}; "
            "use records with the numbering of the cache, or cache again"
        )
    return rows


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
