import pickle
import re
from pathlib import Path

import pytest

from gkd.storage import errors
from gkd.storage.util import extras


def test_the_docstring_draws_the_tree() -> None:
    """Names, parents and order of the drawing are those of the classes."""
    drawn = []
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^ {4}([│├└─ ]*)(\w+(?:Error))(?: \((\w+)\))?", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        parents[depth:] = [found[2]]
        drawn.append((found[2], parents[depth - 1] if depth else "Exception", found[3]))

    defined = [
        (
            each.__name__,
            each.__bases__[0].__name__,
            each.__bases__[1].__name__ if len(each.__bases__) > 1 else None,
        )
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, Exception)
    ]
    assert drawn == defined
    assert len(drawn) == 7


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(errors.ConfigError, match=r"no_such_module.*pip install '\.\[plot\]'"):
        extras.require("no_such_module.part", "plot")


def test_a_message_is_made_of_the_fields_that_are_given() -> None:
    error = errors.ConfigError(
        "temperature", path=Path("run.toml"), expected="1, 2 or 4", got=3, remedy="choose one"
    )
    assert str(error) == "run.toml: temperature: expected 1, 2 or 4, got 3; choose one"
    assert str(errors.GkdError(path="s3://faces", expected=1, got=0)) == (
        "s3://faces: expected 1, got 0"
    )
    assert str(errors.SpecMismatchError("another teacher")) == "another teacher"


def test_an_error_of_a_worker_process_keeps_its_fields() -> None:
    error = errors.CorruptShardError("cut", path=Path("a"), expected=3, got=2, remedy="pull it")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error))
