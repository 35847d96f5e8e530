"""Commands of gkd in this process, as a user types them."""

from click.testing import CliRunner, Result

from gkd.cli import main

# A student that trains in seconds.
TINY = (
    *("--set", "student.name=iresnet18", "--set", "student.width=0.125"),
    *("--set", "student.input_size=28", "--set", "student.embedding_dim=16"),
    *("--set", "train.epochs=2", "--set", "train.batch_size=8", "--set", "data.workers=0"),
    *("--set", "schedule.warmup_epochs=1"),
)


def gkd(*arguments: object) -> Result:
    """Run a command, whatever becomes of it."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def works(*arguments: object) -> str:
    """What a command that succeeds prints."""
    result = gkd(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 1) -> str:
    """What a user reads of a failure: one message and no traceback."""
    result = gkd(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.stderr
