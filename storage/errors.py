"""Every error a user can meet.

    GkdError
    ├── ConfigError (ValueError)      an option, a configuration or an environment that cannot work
    ├── CorruptDataError              bytes that are not what they should be
    │   ├── CorruptRecordError        a record, an image, a verification set
    │   └── CorruptShardError         a file of a target cache
    ├── SpecMismatchError             whole, but of another teacher, data set or class space
    └── IncompleteCacheError          not finished: run the same command again to resume

A message says what, where, expected, got, and what to do next. The command line prints it as it
is and exits with 1; nothing else of gkd's own making reaches a user.
"""


class GkdError(Exception):
    """Base of every error that is the input's or the environment's fault, never a bug's."""


class ConfigError(GkdError, ValueError):
    """An option, a configuration file or an environment that cannot work."""


class CorruptDataError(GkdError):
    """Bytes that are not what they should be."""


class CorruptRecordError(CorruptDataError):
    """A record, an image or a verification set that cannot be read."""


class CorruptShardError(CorruptDataError):
    """A file of a target cache that is missing, damaged or lies about its content.

    ``fault`` is the message without what to do next, for lists of many.
    """

    def __init__(self, fault: str, remedy: str = "") -> None:
        super().__init__(fault, remedy)
        self.fault = fault
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.fault}; {self.remedy}" if self.remedy else self.fault


class SpecMismatchError(GkdError):
    """A whole cache, but of another teacher, data set or class space."""


class IncompleteCacheError(GkdError):
    """A cache that is not finished: run the same command again to resume."""
