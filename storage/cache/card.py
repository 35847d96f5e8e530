"""The card of a cache: ``README.md``, what a person should know before training on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit
from gkd.storage.cache.metadata import read_commit, read_spec
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import write_file

_ABOUT = (
    "A cache of targets for Grouped Knowledge Distillation of face recognisers: for every "
    "image the few identities that the teacher holds possible, and how much it leaves for "
    "all others. A student is trained from it without the teacher. It holds no image, only "
    "digests, labels and record names, so you need the data set as well."
)
_CONTENT, _TERMS, _USE = "## What is in it", "## Terms", "## How to use it"
_BESIDES = "The terms of the data set and of the teacher hold besides."
_NO_LICENCE = (
    "No licence was stated. Ask whoever gave you this cache before you use it or pass it on."
)


def write_card(
    path: Path,
    *,
    licence: str | None = None,
    note: str | None = None,
    sources: Sequence[Path] = (),
) -> None:
    """Write the card of a cache whose shards are all committed; its manifest covers it then.

    A licence or note that is not given is that of ``sources``, the caches that it was made of. The
    bytes follow from the caches and the arguments alone. The card of a finished cache stays.

    Raises:
        ConfigError: where the cache is finished and its card has not these words.
        CorruptShardError: where a commit record is missing or damaged.
    """
    if (path / layout.MANIFEST).exists():
        _require_words(path / layout.CARD, {"--licence": licence, "--note": note})
        return
    spec = read_spec(path)
    commits = [read_commit(path, spec, shard) for shard in range(spec.num_shards)]
    theirs = joined_words(sources) if sources else (None, None)
    text = card_text(spec, commits, licence=licence or theirs[0], note=note or theirs[1])
    for leftover in path.glob(f".{layout.CARD}.*"):
        leftover.unlink()
    write_file(path / layout.CARD, text.encode())


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
        _ABOUT,
        note.strip() if note else "",
        _CONTENT,
        bullets(_content(spec, commits)),
        "## How it was made",
        bullets(_making(spec)),
        _TERMS,
        licence.strip() if licence else _NO_LICENCE,
        _BESIDES,
        _USE,
        f"    gkd targets pull ADDRESS {name}.gkd{_training(spec, name)}",
        views_note(spec),
        "ADDRESS is where this file is, RECORDS your copy of the data set: in any order and "
        "packing, as long as its encoded images are the same bytes. `gkd targets verify "
        f"{name}.gkd` proves that the copy is whole. `zarr.json` has all settings, and any Zarr "
        "reader opens the arrays.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(spec: CacheSpec, name: str) -> str:
    if "original" not in spec.views:
        return ""
    unmirrored = "" if "flipped" in spec.views else " --set data.flip=false"
    return f"\n    gkd train-student RECORDS {name}.gkd RUN{unmirrored}"


def views_note(spec: CacheSpec) -> str:
    """What a cache of one view is good for; nothing where it has both."""
    if "flipped" not in spec.views:
        return (
            "It has targets of the images as they are and none of their mirror images, so it "
            "trains with `--set data.flip=false` only."
        )
    if "original" not in spec.views:
        return (
            "It has targets of mirror images alone. `gkd train-student` shows images as they are "
            "in every training and cannot use it: it is for programs that read it themselves."
        )
    return ""


def words_of(cache: Path) -> tuple[str | None, str | None]:
    """Licence and note that the card of a cache has, None for what its maker did not say."""
    card = cache / layout.CARD
    text = card.read_text() if card.is_file() else ""
    note, _, content = text.partition(f"{_ABOUT}\n\n")[2].partition(f"{_CONTENT}\n")
    terms = content.rpartition(f"{_USE}\n")[0].partition(f"{_TERMS}\n")[2]
    licence = terms.rpartition(_BESIDES)[0].strip()
    return (licence if licence not in ("", _NO_LICENCE) else None), note.strip() or None


def joined_words(caches: Sequence[Path]) -> tuple[str | None, str | None]:
    """Licence and note for a cache that is made of others.

    What all say is said once; else each word is told with the number of its cache, from 1.
    """
    licences, notes = zip(*map(words_of, caches), strict=True)
    return (
        _joined(licences, "Of cache {}: ", _NO_LICENCE),
        _joined(notes, "Of cache {}: ", None),
    )


def _joined(words: Sequence[str | None], head: str, nothing: str | None) -> str | None:
    if len(set(words)) == 1:
        return words[0]
    told = [(number, word or nothing) for number, word in enumerate(words, 1)]
    return "\n\n".join(head.format(number) + word for number, word in told if word)


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
    means = "the mean of each identity's embeddings"
    source = {
        "file": code(centers.name),
        "class-mean": means,
        "refined": f"{means}, refined by a margin head over frozen embeddings",
    }[centers.kind]
    rounded = "" if centers.precision == "float32" else f", rounded to {centers.precision}"
    temperatures = ", ".join(f"{temperature:g}" for temperature in spec.temperatures)
    software = ", ".join(f"{name} {version}" for name, version in sorted(spec.software.items()))
    lines = [
        f"Teacher: {code(teacher.name)}, {code(teacher.arch)}, embeddings of length "
        f"{teacher.embedding_dim:,}; sha256 of its weights `{teacher.sha256}`",
        f"Its input: pixels as {code(preprocess.name)} has them, "
        f"{'BGR' if preprocess.bgr else 'RGB'}; arithmetic in {spec.precision}",
        f"Centres of the identities: {source}{rounded}; sha256 `{centers.sha256}`",
        f"Data: {code(spec.dataset.name)}, {spec.dataset.num_images:,} images of "
        f"{spec.dataset.num_classes:,} identities, fingerprint `{spec.dataset.fingerprint}`",
        f"Logits: {spec.scale:g} times the cosine, {spec.margin:g} less of it for the label",
        f"Groups: the shortest list of most probable identities with {spec.threshold:g} of the "
        f"probability at temperature {spec.group_temperature:g}, and the label",
        f"Temperatures that a student may be trained at: {temperatures}"
        + (f" by the groups, {spec.draws.temperature:g} by the draws" if spec.draws else ""),
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
