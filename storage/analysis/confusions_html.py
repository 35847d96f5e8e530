"""``confusions.html``: what a teacher confuses, with the faces, for a person to page through.

One self-contained page: the items are HTML, the faces stand once each in a block of JSON, and the
page's own script shows some items at a time with their faces. Without scripts all items are there,
without faces.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gkd.storage.analysis.confusions import Confusions
from gkd.storage.util import html as page

EXAMPLES = 3  # faces of an identity beside an image

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --mark: #eef3fa; --warn: #a4420f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e4e8ed; --dim: #9aa4b1; --line: #303842; --blue: #86b7f0;
    --mark: #1d2a3a; --warn: #f0a36b; }
}
body { background: var(--paper); max-width: 68rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 2rem 0 0;
  border-bottom: 2px solid var(--ink); }
button, input { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; padding: .35rem .8rem; }
button { cursor: pointer; }
button:disabled { opacity: .45; cursor: default; }
nav button { border-bottom: 0; border-radius: 6px 6px 0 0; }
nav button[aria-current="true"] { background: var(--ink); color: var(--paper);
  border-color: var(--ink); }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
.bar { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem;
  align-items: center; padding: .7rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); }
.bar input { flex: 1 1 14rem; min-width: 0; }
.bar output { color: var(--dim); font-variant-numeric: tabular-nums; min-width: 8rem;
  text-align: center; }
section.list h2 { border-top: 0; margin-top: .6rem; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 9rem 1fr 1fr; gap: 1.2rem; padding: 1.1rem 0;
  border-bottom: 1px solid var(--line); }
h3 { margin: 0; overflow-wrap: anywhere; }
h3 span { color: var(--dim); font-weight: 400; font-size: .85rem; }
li p { margin: .15rem 0; font-size: .87rem; color: var(--dim); }
.number { font-size: 1.35rem; color: var(--blue); font-variant-numeric: tabular-nums; }
.tag { color: var(--warn); font-weight: 600; }
.faces { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .5rem; }
.face { width: 5.5rem; margin: 0; }
.face img { width: 100%; aspect-ratio: 1; border-radius: 6px; background: var(--mark); }
.face figcaption { color: var(--dim); font-size: .72rem; line-height: 1.3;
  overflow-wrap: anywhere; }
.own .face { width: 100%; max-width: 9rem; }
.nothing { color: var(--dim); padding: 2rem 0; }
[hidden] { display: none !important; }
@media (max-width: 46rem) { li { grid-template-columns: 1fr; } .own .face { max-width: 7rem; } }
@media print { .bar, nav { display: none; } }
"""

_SCRIPT = """
"use strict";
const SHOWN = 10;
const faces = JSON.parse(document.getElementById("faces").textContent);
const lists = [...document.querySelectorAll("section.list")];
const items = [...document.querySelectorAll("section.list li")];
const tabs = [...document.querySelectorAll("nav button")];
const filter = document.getElementById("filter");
const told = document.getElementById("told");
const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
const firsts = lists.map(() => 0);
let list = 0;

function show() {
  tabs.forEach((tab, place) => tab.setAttribute("aria-current", String(place === list)));
  lists.forEach((section, place) => { section.hidden = place !== list; });
  const words = filter.value.trim().toLowerCase();
  const found = [...lists[list].querySelectorAll("li")].filter(
    (item) => item.dataset.words.toLowerCase().includes(words));
  const last = Math.max(0, SHOWN * (Math.ceil(found.length / SHOWN) - 1));
  const first = firsts[list] = Math.min(Math.max(0, firsts[list]), last);
  const seen = new Set(found.slice(first, first + SHOWN));
  for (const item of items) {
    item.hidden = !seen.has(item);
    for (const image of item.querySelectorAll("img")) {
      // Only what is seen is decoded.
      if (seen.has(item)) image.src = "data:image/jpeg;base64," + faces[image.dataset.face];
      else image.removeAttribute("src");
    }
  }
  lists[list].querySelector(".nothing").hidden = found.length > 0;
  told.textContent = found.length
    ? `${first + 1}\\u2013${Math.min(first + SHOWN, found.length)} of ${found.length}` : "none";
  previous.disabled = first === 0;
  next.disabled = first >= last;
}

function turn(pages) {
  firsts[list] += pages * SHOWN;
  show();
  document.querySelector("nav").scrollIntoView();
}

tabs.forEach((tab, place) => tab.addEventListener("click", () => { list = place; show(); }));
previous.addEventListener("click", () => turn(-1));
next.addEventListener("click", () => turn(1));
filter.addEventListener("input", () => { firsts.fill(0); show(); });
document.addEventListener("keydown", (event) => {
  const turns = { ArrowLeft: -1, ArrowRight: 1 };
  const plain = !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey);
  if (plain && event.target !== filter && event.key in turns) {
    event.preventDefault();
    turn(turns[event.key]);
  }
});
for (const each of document.querySelectorAll(".scripted")) each.hidden = false;
show();
"""


def shown_rows(found: Confusions, most: int) -> dict[int, list[int]]:
    """Rows of each class that the first ``most`` items of each list show, class -> rows.

    One more than is shown of each: an image is not shown beside itself.
    """
    classes: set[int] = set()
    for table, names in (
        (found.identities, ("a", "b")),
        (found.label_noise, ("label", "other")),
        (found.hard, ("label", "likeliest")),
    ):
        for name in names:
            classes.update(table[name].slice(0, most).to_pylist())
    return found.examples(classes, EXAMPLES + 1)


def confusion_page(
    found: Confusions,
    most: int,
    examples: Mapping[int, list[int]],
    keys: Mapping[int, str],
    faces: Mapping[int, bytes],
) -> bytes:
    """The page with the first ``most`` items of each list.

    examples  rows of each class that is named, as ``shown_rows`` gives them
    keys      record key of each of these rows
    faces     JPEG of each row that has one; without any the page says how to get them
    """
    pen = _Pen(examples, keys, faces)
    spec = found.samples.cache.spec
    shown = {
        name: table.slice(0, most).to_pylist()
        for name, table in (
            ("identities", found.identities),
            ("noise", found.label_noise),
            ("hard", found.hard),
        )
    }
    titles = {
        "identities": "Identities that share mass",
        "noise": "Labels in doubt",
        "hard": "Hard images",
    }
    tabs = "".join(
        f'<button type="button">{page.escape(title)} ({len(shown[name]):,})</button>'
        for name, title in titles.items()
    )
    body = [
        page.heading(1, f"What the teacher confuses: {found.samples.cache.path.name}"),
        page.paragraph(
            f"{spec.teacher.name} on {spec.dataset.name}: {spec.num_samples:,} images of "
            f"{spec.num_classes:,} identities; probabilities p' at T = {spec.group_temperature:g} "
            f"with the label's margin taken out, means over the views {' and '.join(spec.views)}.",
            dim=True,
        ),
        "<noscript><p>Faces, pages and the filter need this page's own script; all items are "
        "below.</p></noscript>",
        *([] if faces else [page.paragraph("No faces: run again with --records RECORDS.")]),
        f'<nav class="scripted" aria-label="Lists" hidden>{tabs}</nav>',
        '<div class="bar scripted" hidden><input id="filter" type="search" '
        'placeholder="Record key, class, row or digest" aria-label="Filter by text">'
        '<button type="button" id="previous">Previous</button>'
        '<output id="told" aria-live="polite"></output>'
        '<button type="button" id="next">Next</button></div>',
        *_section("identities", titles, _SHARE, map(pen.pair, shown["identities"])),
        *_section("noise", titles, _DOUBT, map(pen.doubtful, shown["noise"])),
        *_section("hard", titles, _HARD, map(pen.hard, shown["hard"])),
        *_origin(found),
        f'<script type="application/json" id="faces">{pen.face_block()}</script>',
    ]
    title = f"{found.samples.cache.path.name}: what the teacher confuses"
    return page.page(title, body, style=_STYLE, script=_SCRIPT)


_SHARE = (
    "Two classes between which images are torn: one person under two labels, or two who look "
    "alike. overlap is the geometric mean, over both classes, of the mean of sqrt(p'(a) p'(b)) "
    "over their images: 0.5 is one person to the teacher. Beside it the mean mass that images of "
    "one give to the other."
)
_DOUBT = (
    "Images that the teacher takes for another identity than their label. The number is how much "
    "higher the cosine to that identity's centre is than to the label's. 'Swapped' says that an "
    "image of that identity is in turn taken for this label. Faces beside an image are those of "
    "their identity that the teacher is surest of; an identity with few images may hold the wrong "
    "one among them."
)
_HARD = (
    "Images of which no identity has half: the number is the claim, the largest p' of any. "
    "captured is the mass of all classes that the cache tells of; entropy is in nats."
)


def _section(
    name: str, titles: Mapping[str, str], words: str, items: Iterable[str]
) -> Iterator[str]:
    yield f'<section class="list" id="{name}" aria-label="{page.escape(titles[name])}">'
    yield page.heading(2, titles[name])
    yield page.paragraph(words, dim=True)
    yield "<ol>"
    yield from items
    yield '</ol><p class="nothing" hidden>Nothing here.</p></section>'


def _origin(found: Confusions) -> Iterator[str]:
    cache, spec = found.samples.cache, found.samples.cache.spec
    facts = {
        "Cache": str(cache.path),
        "Cache id": cache.id,
        "Teacher": f"{spec.teacher.name}, {spec.teacher.arch}, sha256 {spec.teacher.sha256}",
        "Centres": f"{spec.centers.kind}, sha256 {spec.centers.sha256}",
        "Data set fingerprint": spec.dataset.fingerprint,
        "Samples skipped": f"{int((~found.samples.present).sum()):,}",
        "Left out of any pair's figures, at most": f"{found.left_out:.3g}",
    }
    yield page.heading(2, "How it was made")
    rows = ([name, value] for name, value in facts.items())
    yield page.table("origin", ["What", "Value"], rows, words=(0, 1))


class _Pen:
    """Writes items, and remembers whose faces they show."""

    def __init__(
        self,
        examples: Mapping[int, list[int]],
        keys: Mapping[int, str],
        faces: Mapping[int, bytes],
    ) -> None:
        self.examples, self.keys, self.faces = examples, keys, faces
        self._shown: set[int] = set()

    def pair(self, item: Mapping[str, Any]) -> str:
        """Two identities."""
        own = (
            f'<div><div class="number">{item["overlap"]:.3f}</div><p>overlap</p>'
            f"<p>{item['a']} gives {item['mass_ab']:.1%}</p>"
            f"<p>{item['b']} gives {item['mass_ba']:.1%}</p></div>"
        )
        sides = [
            self._identity(f"Class {item[side]}", item[side], item[f"images_{side}"])
            for side in "ab"
        ]
        words = [item[name] for name in ("a", "b", "key_a", "key_b")]
        return self._item(words, own, sides)

    def doubtful(self, item: Mapping[str, Any]) -> str:
        """An image and what it is taken for."""
        tag = '<p class="tag">Swapped</p>' if item["swapped"] else ""
        numbers = (
            f'<div class="number">+{item["lead"]:.3f}</div>{tag}'
            f"<p>p' {item['own']:.2g} of the label, {item['other_prob']:.2g} of {item['other']}</p>"
        )
        sides = [
            self._identity(f"Filed under {item['label']}", item["label"], item["images"], item),
            self._identity(f"Looks like {item['other']}", item["other"], item["other_images"]),
        ]
        return self._image(item, "other", numbers, sides)

    def hard(self, item: Mapping[str, Any]) -> str:
        """An image that no identity claims."""
        numbers = (
            f'<div class="number">{item["claim"]:.3f}</div>'
            f"<p>captured {item['captured']:.1%}, entropy {item['entropy']:.2f}</p>"
        )
        likeliest = item["likeliest"]
        name = "Filed under" if likeliest != item["label"] else "Filed under, and nearest,"
        sides = [
            self._identity(f"{name} {item['label']}", item["label"], item["images"], item),
            self._identity(f"Nearest {likeliest}", likeliest, None)
            if likeliest != item["label"]
            else "",
        ]
        return self._image(item, "likeliest", numbers, sides)

    def _image(self, item: Mapping[str, Any], other: str, numbers: str, sides: list[str]) -> str:
        own = f'<div class="own">{self._face(item["row"], item["key"])}{numbers}</div>'
        words = [item["key"], item["row"], item["label"], item[other], item["digest"].hex()]
        return self._item(words, own, sides)

    def _item(self, words: Iterable[object], own: str, sides: Iterable[str]) -> str:
        told = page.escape(" ".join(map(str, words)))
        return f'<li data-words="{told}">{own}{"".join(sides)}</li>'

    def _identity(
        self, title: str, number: int, images: int | None, but: Mapping[str, Any] | None = None
    ) -> str:
        """Faces of a class, without that of the image ``but``."""
        rows = [row for row in self.examples[number] if but is None or row != but["row"]]
        faces = "".join(self._face(row, self.keys[row]) for row in rows[:EXAMPLES])
        count = ""
        if images is not None:
            count = f" <span>{images:,} image{'s' * (images != 1)}</span>"
        return f'<div><h3>{page.escape(title)}{count}</h3><div class="faces">{faces}</div></div>'

    def _face(self, row: int, key: str) -> str:
        image = ""
        if row in self.faces:
            self._shown.add(row)
            image = f'<img data-face="{row}" width="112" height="112" alt="">'
        return f'<figure class="face">{image}<figcaption>{page.escape(key)}</figcaption></figure>'

    def face_block(self) -> str:
        """The faces that were shown as JSON, in base 64: nothing of it can end a script."""
        encoded = {
            str(row): base64.b64encode(self.faces[row]).decode() for row in sorted(self._shown)
        }
        return json.dumps(encoded)
