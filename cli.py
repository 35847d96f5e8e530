"""The command line: the only place where pipeline and trainer meet."""

import logging
import os
import signal
from typing import Any

import click

from gkd.commands.centers import centers
from gkd.commands.models import demo, evaluate, export, report
from gkd.commands.plan import plan
from gkd.commands.records import records
from gkd.commands.shared import printable
from gkd.commands.stages import cache_teacher, train_student
from gkd.commands.targets import targets
from gkd.storage.errors import GkdError


class Commands(click.Group):
    """Commands whose users' mistakes end in one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors that are no bugs into click's."""
        try:
            return super().invoke(ctx)
        except GkdError as error:
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt as error:
            raise click.ClickException("interrupted") from error
        except BrokenPipeError:  # click's to handle: nobody reads on
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{place}{error.strerror or error}")) from error
        except (MemoryError, RuntimeError) as error:
            if not _memory_ran_out(error):
                raise
            reason = printable(str(error).partition("\n")[0])
            raise click.ClickException(
                f"memory ran out ({reason or 'no more to be had'}); take a smaller batch "
                "(--batch-size, train.batch_size), or fewer --workers or data.workers"
            ) from error


def _memory_ran_out(error: Exception) -> bool:
    """Whether the system's or a GPU's memory did; torch has a class for the latter alone."""
    is_cuda = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_cuda or "can't allocate memory" in str(error)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gkd")
def main() -> None:
    """Cache a face-recognition teacher once, distil any number of students from it."""
    signal.signal(signal.SIGTERM, _interrupt)
    # A backend's lost connection has been told by the call that failed; its tasks would repeat it.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Read when torch is loaded: threads that spin while they wait take the decoders' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


STAGES = (plan, cache_teacher, train_student, evaluate, report, export, demo)
for command in (*STAGES, records, centers, targets):
    main.add_command(command)

if __name__ == "__main__":
    main()
