"""Examples in docstrings of the product print what they say."""

import doctest
import importlib

import pytest

from tests.paths import ROOT

FOLDERS = ("commands", "demo", "pipeline", "storage", "trainer")
MODULES = [
    "gkd." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
