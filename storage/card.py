"""The card of a cache: ``README.md``, what a person should know before training on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from gkd.storage import atomic, layout
from gkd.storage.cache import read_commit, read_spec
from gkd.storage.errors import ConfigError
from gkd.storage.layout import Commit
from gkd.storage.spec import CacheSpec

_NO_LICENCE = (
    "No licence was stated. Ask whoever gave you this cache before you use it or pass it on."
)


def write_card(path: Path, *, licence: str | None = None, note: str | None = None) -> None:
    """Write the card of a cache whose shards are all committed; its manifest covers it then.

    The bytes follow from the cache and the arguments alone. The card of a finished cache stays.

    Raises:
        ConfigError: where the cache is finished and its card has not these words.
        CorruptShardError: where a commit record is missing or damaged.
    """
    if (path / layout.MANIFEST).exists():
        _require_words(path / layout.CARD, {"--licence": licence, "--note": note})
        return
    spec = read_spec(path)
    commits = [read_commit(path, spec, shard) for shard in range(spec.num_shards)]
    text = card_text(spec, commits, licence=licence, note=note)
    for leftover in path.glob(f".{layout.CARD}.*"):
        leftover.unlink()
    atomic.write_file(path / layout.CARD, text.encode())


def _require_words(card: Path, words: Mapping[str, str | None]) -> None:
    text = card.read_text() if card.exists() else ""
    for option, given in words.items():
        if given and given.strip() not in text:
            raise ConfigError(
                f"{card}: the cache is finished and its id covers this card, which has other words "
                f"than {option} gives; run the same command without {option}, or make the cache "
                "anew elsewhere"
            )


def card_text(
    spec: CacheSpec,
    commits: Sequence[Commit],
    *,
    licence: str | None = None,
    note: str | None = None,
) -> str:
    """The card as Markdown; ``licence`` and ``note`` are the maker's own words."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in spec.dataset.name)
    parts = [
        f"# What {code(spec.teacher.name)} says of {code(spec.dataset.name)}",
        "A cache of targets for Grouped Knowledge Distillation of face recognisers: for every "
        "image the few identities that the teacher holds possible, and how much it leaves for "
        "all others. A student is trained from it without the teacher. It holds no image, only "
        "digests, labels and record names, so you need the data set as well.",
        note.strip() if note else "",
        "## What is in it",
        bullets(_content(spec, commits)),
        "## How it was made",
        bullets(_making(spec)),
        "## Terms",
        licence.strip() if licence else _NO_LICENCE,
        "The terms of the data set and of the teacher hold besides.",
        "## How to use it",
        "    pip install gkd\n"
        f"    gkd targets pull ADDRESS {name}.gkd\n"
        f"    gkd train-student RECORDS {name}.gkd RUN",
        "ADDRESS is where this file is, RECORDS your copy of the data set: in any order and "
        "packing, as long as its encoded images are the same bytes. `gkd targets verify "
        f"{name}.gkd` proves that the copy is whole. `zarr.json` has all settings, and any Zarr "
        "reader opens the arrays.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _content(spec: CacheSpec, commits: Sequence[Commit]) -> list[str]:
    skipped = sum(len(commit.skipped) for commit in commits)
    seen = spec.num_samples - skipped
    unread = f"; {skipped:,} more could not be read and have no targets" if skipped else ""
    lines = [f"Targets of {seen:,} images of {spec.num_classes:,} identities{unread}"]
    for view in spec.views:
        records = [commit.views[view] for commit in commits]
        mean = sum(record.entries for record in records) / max(seen, 1)
        cut = sum(record.truncated for record in records)
        lines.append(
            f"View {view}: {mean:,.1f} identities an image on average, at most "
            f"{spec.max_group:,}, where {cut:,} groups were cut"
        )
    if spec.draws is not None:
        of = "all" if spec.draws.source == "all" else "the group before it is cut"
        lines.append(
            f"And {spec.draws.count:,} identities an image drawn with replacement at temperature "
            f"{spec.draws.temperature:g}, of {of}"
        )
    return lines


def _making(spec: CacheSpec) -> list[str]:
    teacher, centers, preprocess = spec.teacher, spec.centers, spec.preprocess
    source = (
        "the mean of each identity's embeddings"
        if centers.kind == "class-mean"
        else code(centers.name)
    )
    temperatures = ", ".join(f"{temperature:g}" for temperature in spec.temperatures)
    software = ", ".join(f"{name} {version}" for name, version in sorted(spec.software.items()))
    lines = [
        f"Teacher: {code(teacher.name)}, {code(teacher.arch)}, embeddings of length "
        f"{teacher.embedding_dim:,}; sha256 of its weights `{teacher.sha256}`",
        f"Its input: pixels as {code(preprocess.name)} has them, "
        f"{'BGR' if preprocess.bgr else 'RGB'}; arithmetic in {spec.precision}",
        f"Centres of the identities: {source}; sha256 `{centers.sha256}`",
        f"Data: {code(spec.dataset.name)}, {spec.dataset.num_images:,} images of "
        f"{spec.dataset.num_classes:,} identities, fingerprint `{spec.dataset.fingerprint}`",
        f"Logits: {spec.scale:g} times the cosine, {spec.margin:g} less of it for the label",
        f"Groups: the shortest list of most probable identities with {spec.threshold:g} of the "
        f"probability at temperature {spec.group_temperature:g}, and the label",
        f"Temperatures that a student may be trained at: {temperatures}",
        f"Software: {software}",
    ]
    if spec.derived is not msgspec.UNSET:
        lines.append(
            f"Made without the teacher, by {spec.derived.operation}, from "
            + ", ".join(code(cache) for cache in spec.derived.caches)
        )
    return lines


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def code(name: str) -> str:
    """A name as it is, whatever Markdown would make of it."""
    return f"`{' '.join(name.replace('`', ' ').split())}`"
