"""Results and messages as the commands print them: for people, or as one JSON line."""

from typing import Any

import click
import msgspec


def emit(value: Any, as_json: bool) -> None:
    """Print a result: one JSON object, or one line per field."""
    if as_json:
        emit_json(value)
    else:
        emit_lines(
            {
                name.replace("_", " "): _format(field)
                for name, field in msgspec.to_builtins(value, str_keys=True, enc_hook=str).items()
            }
        )


def emit_lines(lines: dict[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, lines))
    for name, text in lines.items():
        click.echo(f"{name:{width}}  {text}")


def emit_json(value: Any) -> None:
    """Print any value as one line of JSON; numbers that are not finite become null."""
    click.echo(msgspec.json.encode(value, enc_hook=str))


def printable(text: str) -> str:
    """Replace control characters: names in caches and records are not trusted."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def _format(value: Any) -> str:
    match value:
        case bool() | None:
            return str(value)
        case str():
            return printable(value).replace("\n", "\N{REPLACEMENT CHARACTER}")
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case dict():
            pairs = (f"{_format(name)} {_format(item)}" for name, item in value.items())
            return ", ".join(pairs) or "none"
        case _:
            return " ".join(map(_format, value))
