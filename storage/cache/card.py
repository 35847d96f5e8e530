"""The card of a cache: ``README.md``, what a person should know before training on it.

Its text is in ``card.md``. The maker's licence and note are stored in the card alone: ``note``
between ``ABOUT`` and the heading of the content, ``licence`` between the heading of the terms and
``TERMS_END``.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import msgspec

from gkd.storage.cache import layout
from gkd.storage.cache.layout import Commit
from gkd.storage.cache.metadata import read_commit, read_spec
from gkd.storage.cache.spec import CacheSpec
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import delete_temporaries, write_file
from gkd.storage.util.input_files import read_small
from gkd.storage.util.text import printable

ABOUT = (
    "A cache of targets for Grouped Knowledge Distillation of face recognisers: for every "
    "image the few identities that the teacher holds possible, and how much it leaves for "
    "all others. A student is trained from it without the teacher. It holds no image, only "
    "digests, labels and record names, so you need the data set as well."
)
CONTENT, TERMS, USE = "## What is in it", "## Terms", "## How to use it"
TERMS_END = "The terms of the data set and of the teacher hold besides."
NO_LICENCE = (
    "No licence was stated. Ask whoever gave you this cache before you use it or pass it on."
)
_STORED = re.compile(
    rf"{re.escape(ABOUT)}\n\n(?P<note>.*?){CONTENT}\n"
    rf".*?{TERMS}\n\n(?P<licence>.*)\n\n{re.escape(TERMS_END)}\n\n{USE}\n",
    re.DOTALL,
)


def write_card(
    path: Path,
    *,
    licence: str | None = None,
    note: str | None = None,
    sources: Sequence[Path] = (),
) -> None:
    """Write the card of a cache whose shards are all committed; its manifest covers it then.

    By default licence and note are those of ``sources``, the caches that it was made from. The
    bytes follow from the caches and the arguments alone. A finished cache keeps its card.

    Raises:
        ConfigError: if the cache is finished and its card has another licence or note.
        CorruptShardError: if a commit record is missing or damaged.
    """
    if (path / layout.MANIFEST).exists():
        _check_terms(path / layout.CARD, {"--licence": licence, "--note": note})
        return
    spec = read_spec(path)
    commits = [read_commit(path, spec, shard) for shard in range(spec.num_shards)]
    inherited = join_terms(sources) if sources else (None, None)
    text = card_text(spec, commits, licence=licence or inherited[0], note=note or inherited[1])
    delete_temporaries(path, layout.CARD)
    write_file(path / layout.CARD, text.encode())


def _check_terms(card: Path, terms: Mapping[str, str | None]) -> None:
    text = _read(card)
    for option, given in terms.items():
        if given and stated(given) not in text:
            raise ConfigError(
                f"the cache is finished and its id covers this card, which differs from {option}",
                path=card,
                remedy=f"run the same command without {option}, or make another cache elsewhere",
            )


def card_text(
    spec: CacheSpec,
    commits: Sequence[Commit],
    *,
    licence: str | None = None,
    note: str | None = None,
) -> str:
    """The card as Markdown; ``licence`` and ``note`` are the maker's own words."""
    return _template().render(
        spec=spec,
        derived=None if spec.derived is msgspec.UNSET else spec.derived,
        skipped=sum(len(commit.skipped) for commit in commits),
        views=[
            (
                view,
                sum(commit.views[view].entries for commit in commits),
                sum(commit.views[view].truncated for commit in commits),
            )
            for view in spec.views
        ],
        name="".join(c if c.isalnum() or c in "-_." else "-" for c in spec.dataset.name),
        code=code,
        plain=plain,
        about=ABOUT,
        note=note and stated(note),
        licence=stated(licence) if licence else NO_LICENCE,
        content_heading=CONTENT,
        terms_heading=TERMS,
        terms_end=TERMS_END,
        use_heading=USE,
        views_note=views_note(spec),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.from_string(Path(__file__).with_suffix(".md").read_text())


def views_note(spec: CacheSpec) -> str:
    """How a cache of one view can be used; empty for both."""
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


def _read(card: Path) -> str:
    content = read_small(card, follow_links=False) if os.path.lexists(card) else b""
    return content.decode(errors="replace")


def read_terms(cache: Path) -> tuple[str | None, str | None]:
    """Licence and note in the card of a cache, None for what its maker did not state."""
    card = cache / layout.CARD
    stored = _STORED.search(_read(card))
    if stored is None:
        return None, None
    licence, note = stored["licence"].strip(), stored["note"].strip()
    return (licence if licence not in ("", NO_LICENCE) else None), note or None


def join_terms(caches: Sequence[Path]) -> tuple[str | None, str | None]:
    """Licence and note for a cache that is made from others.

    Equal ones are stated once; otherwise each is stated with the number of its cache, from 1.
    """
    licences, notes = zip(*map(read_terms, caches), strict=True)
    return _join(licences, NO_LICENCE), _join(notes, None)


def _join(texts: Sequence[str | None], default: str | None) -> str | None:
    if len(set(texts)) == 1:
        return texts[0]
    stated = [(number, text or default) for number, text in enumerate(texts, 1)]
    return "\n\n".join(f"Of cache {number}: {text}" for number, text in stated if text)


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def code(name: str) -> str:
    """A name as Markdown code, whatever characters it has."""
    return f"`{' '.join(printable(name).replace('`', ' ').split())}`"


def plain(name: str) -> str:
    """A name or version, as code unless Markdown gives none of its characters a meaning."""
    return name if re.fullmatch(r"[\w .+-]*", name) else code(name)


def stated(text: str) -> str:
    """A licence or a note, Markdown in its maker's words, without control characters."""
    return printable(text).strip()
