"""What ``--help`` shows of every command."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gkd.cli import main
from gkd.commands.options import LOCATION, OUTPUT_PATH
from gkd.storage.errors import ConfigError
from gkd.storage.reading.mmap_store import default_folder
from tests.caches import make_cache
from tests.commands.running import fails, works


def all_commands(group: click.Group = main) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from all_commands(command)
        else:
            yield command


@pytest.mark.parametrize("group", [(), ("records",), ("centers",), ("targets",)])
def test_every_command_is_listed_with_a_summary_that_fits(group: tuple[str, ...]) -> None:
    listed = works(*group, "--help")
    commands = main if not group else main.commands[group[0]]
    assert isinstance(commands, click.Group)
    for name, command in commands.commands.items():
        assert f"{name} " in listed
        assert command.get_short_help_str() in listed
    assert "..." not in listed.partition("Commands:")[2]
    assert max(map(len, listed.splitlines())) < 80


def test_every_option_is_explained() -> None:
    unexplained = [
        (command.name, option.name)
        for command in all_commands()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert not unexplained


def test_other_spellings_are_accepted_and_not_shown() -> None:
    shown = works("cache-teacher", "--help")
    assert "--licence" in shown
    assert "--license" not in shown
    with_alias = ("--teacher", "none.onnx", "--centres", "class-mean", "--license", "MIT")
    assert "nowhere" in fails("cache-teacher", "nowhere", "out.gkd", *with_alias)


def test_the_version_is_printed() -> None:
    assert works("--version").startswith("gkd, version ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("targets", "verify", "s3://bucket/cache.gkd"),
        ("train-student", "faces", "s3://bucket/cache.gkd", "run"),
        ("records", "pack", "faces", "s3://bucket/pack"),
    ],
)
def test_an_address_is_refused_by_commands_that_need_a_local_path(
    arguments: tuple[str, ...],
) -> None:
    message = fails(*arguments, code=2)
    assert "expected a local path, got the address s3://bucket/" in message
    assert "gkd targets pull" in message


ADDRESSES = ("gs://b/x", "s3:/b/x", "ftp://me:secret@host/x", "simplecache::s3://b/x", "file:///x")


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_local_path_refuses_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = [
        parameter
        for command in all_commands()
        for parameter in command.params
        if isinstance(parameter.type, click.Path) and parameter.type is not LOCATION
    ]
    assert {parameter.name for parameter in local} >= {"out", "source", "centers", "teacher"}
    for parameter in local:
        with pytest.raises(click.BadParameter, match="got the address") as caught:
            parameter.type.convert(address, parameter, None)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("GKD_CACHE_DIR", address)
    with pytest.raises(ConfigError, match="expected a local path"):
        default_folder()


def test_no_option_accepts_an_output_inside_a_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.gkd")
    with pytest.raises(ConfigError, match=f"inside the cache {cache.path}, which it would damage"):
        OUTPUT_PATH.convert(f"{cache.path}/commits/x.png", None, None)
    unguarded = {
        (command.name, parameter.name)
        for command in all_commands()
        for parameter in command.params
        if parameter.name in ("out", "plot", "cache") and parameter.type is not OUTPUT_PATH
    }
    # What makes these refuses it: test_targets.test_nothing_is_made_inside_a_cache.
    assert unguarded == {
        ("cache-teacher", "out"),
        ("build", "out"),
        ("confusions", "out"),
        ("retarget", "out"),
        ("merge", "out"),
    }
