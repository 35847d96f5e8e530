"""The documentation: its commands work as written, and its reference covers every key."""

import importlib.util
import re
import shlex
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gkd.storage.records.open import open_records
from gkd.storage.records.write_pack import pack
from gkd.trainer.config import RunConfig
from gkd.trainer.config_file import load_config, to_toml
from tests.commands.running import works
from tests.paths import ROOT, SHARED_DATA, needs_shared_data

PAGE = (ROOT / "docs" / "getting-started.md").read_text()
IDENTITIES = 40
SMALL = ("student.name=iresnet18", "student.width=0.125", "student.input_size=28")


def blocks(language: str) -> list[str]:
    """The page's fenced blocks in one language; ``bash`` is what this test runs."""
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", PAGE, re.M | re.S)


def write_faces(folder: Path) -> None:
    """A pack of the identities of the LFW pack that have most images, four of each."""
    lfw = open_records(SHARED_DATA / "lfw")
    common = np.argsort(-np.bincount(lfw.labels), kind="stable")[:IDENTITIES]
    images = folder.with_name("images")
    for identity in common.tolist():
        (images / str(identity)).mkdir(parents=True)
        for row in np.flatnonzero(lfw.labels == identity)[:4].tolist():
            (images / str(identity) / f"{row}.jpg").write_bytes(lfw.encoded(row))
    pack(images, folder)


@needs_shared_data
def test_the_commands_of_getting_started_work_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "materialised"))
    write_faces(tmp_path / "faces")
    (tmp_path / "teacher.onnx").symlink_to(SHARED_DATA / "teachers" / "mobilefacenet.onnx")
    (tmp_path / "pairs.bin").symlink_to(SHARED_DATA / "lfw" / "lfw_fold9.bin")
    # The page's settings are valid; a student of their size would take hours here.
    (settings,) = blocks("toml")
    (tmp_path / "student.toml").write_text(settings)
    config = load_config(tmp_path / "student.toml", SMALL)
    train = msgspec.structs.replace(config.train, epochs=2, batch_size=32)
    data = msgspec.structs.replace(config.data, workers=0)
    schedule = msgspec.structs.replace(config.schedule, warmup_epochs=1.0)
    small = msgspec.structs.replace(config, train=train, data=data, schedule=schedule)
    (tmp_path / "student.toml").write_text(to_toml(small))

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 9
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "gkd"
        works(*arguments)
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "student.onnx").exists()


def test_the_configuration_reference_describes_every_key() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    reference = hooks.on_page_markdown("before <!-- configuration --> after")
    for section in msgspec.structs.fields(RunConfig):
        assert f"## `[{section.name}]`" in reference
        for key in msgspec.structs.fields(section.type):
            assert f"\n| `{key.name}` |" in reference
