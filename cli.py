"""The command line: the only place where pipeline and trainer meet."""

import getpass
import logging
import os
import signal
from typing import Any

import click

from gkd.commands.cache_teacher import cache_teacher
from gkd.commands.centers import centers
from gkd.commands.models import demo, evaluate, export, report
from gkd.commands.plan import plan
from gkd.commands.records import records
from gkd.commands.targets import targets
from gkd.commands.train_student import train_student
from gkd.storage.errors import GkdError
from gkd.storage.util.files import describe_os_error
from gkd.storage.util.text import printable

TRACEBACK = "GKD_TRACEBACK"  # show the traceback of what is unexpected


class Commands(click.Group):
    """A group whose users' errors end in one message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which they are used."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors that are not bugs into click's."""
        try:
            return super().invoke(ctx)
        except GkdError as error:
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt as error:
            raise click.ClickException("interrupted") from error
        except BrokenPipeError:  # click handles it: the reader of the pipe has gone
            raise
        except OSError as error:
            raise click.ClickException(printable(str(describe_os_error(error)))) from error
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            if not _is_out_of_memory(error):
                raise click.ClickException(
                    printable(f"unexpected {type(error).__name__}: {str(error)[:500]}\n")
                    + f"This is a bug in gkd, or a file that it should have refused by name. Run "
                    f"the same command with {TRACEBACK}=1 to see where, and report it."
                ) from error
            reason = printable(str(error).partition("\n")[0])
            raise click.ClickException(
                f"out of memory ({reason or 'allocation failed'}); use a smaller batch "
                "(--batch-size, train.batch_size) or fewer workers (--workers, data.workers), "
                "or raise the limit (ulimit -v)"
            ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether host or GPU memory ran out; torch has an error class only for the GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # Of torch's allocator, and of the loader of libraries under `ulimit -v`.
    said = ("can't allocate memory", "failed to map segment", "Cannot allocate memory")
    return any(words in str(error) for words in said)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(package_name="gkd", prog_name="gkd")
def main() -> None:
    """Cache a face-recognition teacher once, distil any number of students from it."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    # The call that lost its connection reports it; asyncio's tasks would repeat it.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:  # torch names folders after the user, who in a container may have no name
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    # Read when torch is loaded: waiting threads must not spin on the decoders' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    plan,
    cache_teacher,
    train_student,
    evaluate,
    report,
    export,
    demo,
    records,
    centers,
    targets,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
