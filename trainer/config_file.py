"""Reads configurations from TOML and ``section.key=value`` settings, and writes them."""

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import inspect

from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import read_small, refuse_foreign
from gkd.trainer.config import HeadConfig, RunConfig, ScheduleConfig, TrainConfig

SECTIONS: dict[str, type[msgspec.Struct]] = {
    section.name: section.type for section in msgspec.structs.fields(RunConfig)
}
# The type of each "section.key".
KEYS: dict[str, Any] = {
    f"{section}.{field.name}": field.type
    for section, table in SECTIONS.items()
    for field in msgspec.structs.fields(table)
}
# Former names, which are still accepted.
RENAMED = {"train.gradient_hook": "train.allreduce_dtype"}
# Keys that may change when a run is resumed: they change no weight.
FREE_KEYS = (
    *("data.workers", "data.cache_id", "train.log_every", "train.max_skipped"),
    *("evaluation", "checkpoint"),
)


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a TOML file and ``section.key=value`` overrides describe; later ones win.

    Values are TOML; a bare word is a string.

    Raises:
        ConfigError: naming origin and key, for a file that is not TOML, an unknown key, a value of
            the wrong type or out of range, or keys that contradict each other.
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    given = [] if path is None else [(str(path), *item) for item in _read(path)]
    given += [("--set", *_parse(override)) for override in overrides]
    for origin, key, value in given:
        _require_known(key, origin)
        key = RENAMED.get(key, key)
        origins[key], values[key] = origin, value
    checked = {key: _check(key, value, KEYS[key], origins[key]) for key, value in values.items()}
    if "schedule.warmup_epochs" not in checked:
        epochs = checked.get("train.epochs", TrainConfig().epochs)
        if epochs <= ScheduleConfig().warmup_epochs:
            checked["schedule.warmup_epochs"] = epochs / 5
    config = msgspec.convert(_nested(checked), RunConfig)
    _require_consistent(config, origins)
    return config


def stored_config(content: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The configuration that a checkpoint holds as builtins, perhaps under former names of keys.

    Raises:
        msgspec.ValidationError: if it is not one.
    """
    renamed = {RENAMED.get(key, key): value for key, value in _flat(content).items()}
    return msgspec.convert(_nested(renamed), RunConfig)


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; ``load_config`` reads it back to an equal value."""
    lines: list[str] = []
    for section, keys in msgspec.to_builtins(config).items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value is not None]
    return "\n".join(lines[1:]) + "\n"


def _flat(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": v for section, keys in content.items() for key, v in keys.items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = value
    return content


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a TOML file."""
    try:
        refuse_foreign(path, "a TOML file", allowed=("empty",))
        content = tomllib.loads(read_small(path).decode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a TOML file"
        ) from error
    # tomllib raises ValueErrors of its own and those of int(), and recurses into brackets.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for section, keys in content.items():
        if section in SECTIONS and not isinstance(keys, Mapping):
            raise ConfigError(f"{path}: {section}: expected a section, got {_shown(keys)}")
        for key, value in keys.items() if isinstance(keys, Mapping) else [("", keys)]:
            yield f"{section}.{key}", value


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    section, _, name = key.strip().partition(".")
    if not (equals and section and name):
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. train.epochs=10")
    return key.strip(), _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        return text
    except ValueError:
        # A shell removes quotes, so a word or a path needs none, in a list neither.
        if text.startswith("[") and text.endswith("]"):
            return [_parse_value(item.strip()) for item in text[1:-1].split(",")]
        return text


def _require_known(key: str, origin: str) -> None:
    if key in KEYS or key in RENAMED:
        return
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"{origin}: unknown section [{section}]{_nearest(section, SECTIONS)}")
    elsewhere = [known for known in KEYS if known.endswith(f".{name}")]
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else _nearest(key, KEYS)
    raise ConfigError(f"{origin}: unknown key {key}{hint}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"


def _check(key: str, value: Any, kind: Any, origin: str) -> Any:
    """The value as ``kind``, a type of ``KEYS``."""
    info = inspect.type_info(kind)
    if isinstance(info, inspect.VarTupleType):
        if not isinstance(value, list):
            item = _toml(value.strip("[]"))[:100] if isinstance(value, str) else _shown(value)
            example = f"{key}=[{item}]"
            raise ConfigError(f"{origin}: {key}: expected a list, {example}, got {_shown(value)}")
        (item,) = get_args(kind)[:1]
        return tuple(_check(f"{key}[{n}]", v, item, origin) for n, v in enumerate(value))
    try:
        checked = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{origin}: {key}: expected {describe_type(info)}, got {_shown(value)}"
        ) from error
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ConfigError(f"{origin}: {key}: expected a finite number, got {value!r}")
    return checked


def _shown(value: object) -> str:
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # an integer that Python does not print, or a deep list
        return f"{type(value).__name__} of any length"


def describe_type(info: inspect.Type) -> str:
    """Which values a key takes, from ``msgspec.inspect.type_info`` of its type."""
    match info:
        case inspect.LiteralType():
            return f"one of {', '.join(map(repr, info.values))}"
        case inspect.UnionType():  # TOML has no null
            return " or ".join(
                describe_type(each) for each in info.types if not isinstance(each, inspect.NoneType)
            )
        case inspect.VarTupleType():
            return f"a list, each {describe_type(info.item_type)}"
        case inspect.IntType() | inspect.FloatType():
            bounds = {">": info.gt, ">=": info.ge, "<": info.lt, "<=": info.le}
            limits = [
                f"{sign} {str(n).removesuffix('.0')}" for sign, n in bounds.items() if n is not None
            ]
            kind = "an integer" if isinstance(info, inspect.IntType) else "a number"
            return f"{kind} {' and '.join(limits)}".strip()
    return "true or false" if isinstance(info, inspect.BoolType) else "a string"


def _require_consistent(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Refuse keys that are valid on their own but not together."""
    head, optimizer, schedule = config.head, config.optimizer, config.schedule
    combined, unset = head.kind == "combined", HeadConfig()
    faults = {
        "head.margin": (
            combined and head.margin is not None,
            "head.kind combined takes head.m1, head.m2 and head.m3",
        ),
        "optimizer.nesterov": (
            optimizer.kind == "sgd" and optimizer.nesterov and optimizer.momentum == 0,
            "Nesterov needs optimizer.momentum above 0; set it, or optimizer.nesterov=false",
        ),
        "schedule.warmup_epochs": (
            schedule.warmup_epochs >= config.train.epochs,
            f"expected less than train.epochs ({config.train.epochs}), got "
            f"{schedule.warmup_epochs:g}",
        ),
        "schedule.final_lr": (
            schedule.final_lr > optimizer.lr,
            f"expected at most optimizer.lr ({optimizer.lr:g}), got {schedule.final_lr:g}",
        ),
    }
    for name in ("m1", "m2", "m3"):
        faults[f"head.{name}"] = (
            not combined and getattr(head, name) != getattr(unset, name),
            f"only head.kind combined takes it; {head.kind} takes head.margin",
        )
    for key, (wrong, why) in faults.items():
        if wrong:
            raise ConfigError(f"{origins.get(key, 'configuration')}: {key}: {why}")


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            # JSON's escapes are TOML's.
            return msgspec.json.encode(value).decode()
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
