"""What ``--help`` shows of every command."""

from collections.abc import Iterator

import click
import pytest

from gkd.cli import main
from gkd.commands.options import OUTPUT_PATH
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


def test_output_files_cannot_be_written_inside_a_cache() -> None:
    """The guard itself is tested with the type; here, that every output option has it."""
    names = {"plot", "cache", "out"}
    guarded = [
        (command.name, each.name)
        for command in all_commands()
        for each in command.params
        if each.name in names and each.type is OUTPUT_PATH
    ]
    assert {name for name, _ in guarded} == {"plan", "evaluate", "export", "demo", "stats"}
