"""Every error a user can meet.

    GkdError
    ├── ConfigError (ValueError)      an option, a configuration or an environment that cannot work
    ├── CorruptDataError              bytes that are not what they should be
    │   ├── CorruptRecordError        a record, an image, a verification set
    │   └── CorruptShardError         a file of a target cache
    ├── SpecMismatchError             complete, but of another teacher, data set or class space
    └── IncompleteCacheError          not finished: run the same command again to resume

A message says what is wrong, where, what was expected, what was found, and what to do next. The
command line prints it and exits with 1; no other error that gkd raises reaches a user.
"""

from pathlib import Path


class GkdError(Exception):
    """Base of every error that is the fault of the input or the environment, never of a bug.

    The message is ``path: problem: expected ..., got ...; remedy``, of the parts that are given.

    problem   what is wrong, without path and remedy
    path      the file, folder or address
    expected  what should be there
    got       what is there instead
    remedy    what to do next
    """

    def __init__(
        self,
        problem: str = "",
        *,
        path: Path | str | None = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        if expected is not None:
            difference = f"expected {expected}, got {got}"
            problem = f"{problem}: {difference}" if problem else difference
        self.problem = problem
        self.path = path
        self.expected = expected
        self.got = got
        self.remedy = remedy

    def __str__(self) -> str:
        located = self.problem if self.path is None else f"{self.path}: {self.problem}"
        return f"{located}; {self.remedy}" if self.remedy else located


class ConfigError(GkdError, ValueError):
    """An option, a configuration file or an environment that cannot work."""


class CorruptDataError(GkdError):
    """Bytes that are not what they should be."""


class CorruptRecordError(CorruptDataError):
    """A record, an image or a verification set that cannot be read."""


class CorruptShardError(CorruptDataError):
    """A file of a target cache that is missing, damaged or inconsistent with the others."""


class SpecMismatchError(GkdError):
    """A complete cache of another teacher, data set or class space."""


class IncompleteCacheError(GkdError):
    """A cache that is not finished: run the same command again to resume."""
