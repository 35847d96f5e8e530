"""Results and messages as the commands print them: for people, or as one JSON line."""

import re
from typing import Any

import click
import msgspec

from gkd.storage.util.text import printable


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
        echo(f"{name:{width}}  {text}")


def emit_json(value: Any) -> None:
    """Print any value as one line of JSON; numbers that are not finite become null."""
    builtins = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    click.echo(msgspec.json.encode(_encodable(builtins)))


def echo(text: object = "", *, err: bool = False) -> None:
    """Print lines for people, on stderr if ``err``; names in them need not be trusted."""
    click.echo(printable(str(text)), err=err)


def _encodable(value: Any) -> Any:
    """Replace what UTF-8 cannot hold, such as bytes of a file name in another encoding."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case dict():
            return {_encodable(name): _encodable(item) for name, item in value.items()}
        case list():
            return [_encodable(item) for item in value]
        case _:
            return value


def _format(value: Any) -> str:
    match value:
        case bool() | None:
            return str(value)
        case str():
            return re.sub(r"[\n\t]", "\N{REPLACEMENT CHARACTER}", value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case dict():
            pairs = (f"{_format(name)} {_format(item)}" for name, item in value.items())
            return ", ".join(pairs) or "none"
        case _:
            return " ".join(map(_format, value))
