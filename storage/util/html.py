"""Renders self-contained HTML pages; every value is escaped, as names in data are not trusted."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

SHARED = Path(__file__).parent  # page.html, page.css and macros.html
# The page may show what it contains and nothing else: no browser fetches anything for it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(template: Path, **values: Any) -> bytes:
    """Render a jinja2 template that extends ``page.html``.

    ``.css`` and ``.js`` files of the same name beside the template become part of the page. The
    Content-Security-Policy names the script by its hash, so that no other script runs.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = (SHARED / "page.css").read_text() + _read(template.with_suffix(".css"))
    script = _read(template.with_suffix(".js"))
    policy = POLICY
    if script:
        policy += f"; script-src 'sha256-{_base64(hashlib.sha256(script.encode()).digest())}'"
    page = environment.get_template(template.name).render(
        values | {"style": style, "script": script, "policy": policy}
    )
    # What UTF-8 cannot hold, such as half a surrogate pair, becomes a question mark.
    return page.encode("utf-8", "replace")


def data_url(media_type: str, content: bytes) -> str:
    """A file's content as the ``src`` of an image."""
    return f"data:{media_type};base64,{_base64(content)}"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
