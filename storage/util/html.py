"""Pieces of a self-contained HTML page. Every string is escaped here: names come from strangers."""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light; --ink: #1d232b; --dim: #5d6673; --line: #dfe3e8; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 4rem; background: #fff;
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 .4rem; padding-top: .9rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.tile dt { color: var(--dim); font-size: .8rem; }
.tile dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; color: var(--blue); }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .87rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--dim); }
.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
pre { background: #f6f7f9; border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.6rem; }
  figure, tr, .tile { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
}
"""
# The page may show what it carries and nothing else: no browser fetches anything for it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> bytes:
    """A whole page of pieces that are HTML already.

    ``style`` comes after ``STYLE``. ``script`` is the page's own, at its end; the policy names it
    by its hash, so that no other runs.
    """
    policy, scripts = POLICY, []
    if script:
        sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{sha256}'"
        scripts = [f"<script>{script}</script>"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
            *body,
            *scripts,
            "</body></html>\n",
        ]
    ).encode()


def escape(text: object) -> str:
    """Text as HTML; what no browser shows, such as half a surrogate pair, becomes a mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def heading(level: int, text: str) -> str:
    """A heading of level 1 to 3."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, dim: bool = False) -> str:
    """One paragraph."""
    kind = ' class="dim"' if dim else ""
    return f"<p{kind}>{escape(text)}</p>"


def code(text: str) -> str:
    """Words as they were typed or filed."""
    return f"<pre>{escape(text)}</pre>"


def tiles(values: Mapping[str, str]) -> str:
    """The few numbers that matter, large."""
    each = (
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
        for name, value in values.items()
    )
    return f'<dl class="tiles">{"".join(each)}</dl>'


def table(
    name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)
) -> str:
    """A table called ``name`` in the page's markup; columns ``words`` hold text, others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = (' class="text"' if place in words else "" for place in range(len(row)))
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(classes, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table id="{escape(name)}"><thead><tr>{cells("th", head)}</tr>'
        f"</thead><tbody>\n{body}</tbody></table></div>"
    )


def figure(svg: bytes, words: str) -> str:
    """A figure inside the page, with ``words`` for those who do not see it."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<figure><img alt="{escape(words)}" src="{source}"></figure>'
