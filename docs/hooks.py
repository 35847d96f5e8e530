"""Generates the configuration reference from the classes of ``gkd.trainer.config``."""

import inspect
import json
import re
from typing import Any

import msgspec

from gkd.trainer.config import RunConfig

PLACEHOLDER = "<!-- configuration -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where a page has the placeholder."""
    return markdown.replace(PLACEHOLDER, reference()) if PLACEHOLDER in markdown else markdown


def reference() -> str:
    """One section per table of the TOML file: its description, and a table of its keys.

    Raises:
        ValueError: if a key has no description, or a description no key.
    """
    parts = []
    for section in msgspec.structs.fields(RunConfig):
        summary, described = _describe(section.type)
        keys = {field.name: field.default for field in msgspec.structs.fields(section.type)}
        if described.keys() != keys.keys():
            wrong = sorted(described.keys() ^ keys.keys())
            raise ValueError(f"[{section.name}]: keys and their descriptions differ: {wrong}")
        rows = [
            f"| `{name}` | {_format(default)} | {described[name]} |"
            for name, default in keys.items()
        ]
        table = ["| key | default | meaning |", "|---|---|---|", *rows]
        parts += [f"## `[{section.name}]`", summary, "\n".join(table)]
    return "\n\n".join(parts)


def _describe(kind: type) -> tuple[str, dict[str, str]]:
    """A section's summary, and the description of each key, from the class's docstring.

    A key starts its line and two spaces follow; continuation lines are indented.
    """
    summary, _, body = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    described: dict[str, str] = {}
    names: list[str] = []
    for line in body.splitlines():
        if match := re.match(r"(\w+(?:, \w+)*) +(.*)", line):
            names = match[1].split(", ")
            described |= dict.fromkeys(names, match[2])
        else:
            described |= {name: f"{described[name]} {line.strip()}" for name in names}
    text = summary.removeprefix("``[").partition("]``")[2].lstrip(":. ").replace("``", "`")
    return text, {
        name: description.replace("``", "`").replace("|", "\\|")
        for name, description in described.items()
    }


def _format(default: object) -> str:
    return "by `kind` or `name`" if default is None else f"`{json.dumps(default)}`"
