"""``gkd records`` as a user types it, and what other commands make of each form of records."""

import json
import re
import shutil
from pathlib import Path

import pytest

from gkd.storage.records.open import open_records
from tests.commands.running import TINY, fails, gkd, works
from tests.storage.records.packs import jpeg
from tests.storage.records.test_forms import write_form

pytestmark = pytest.mark.usefixtures("materialised")


def test_records_are_packed_described_and_verified(home: Path, tmp_path: Path) -> None:
    packed = json.loads(works("records", "pack", home / "faces", tmp_path / "pack", "--json"))
    assert (packed["images"], packed["identities"]) == (32, 8)
    info = json.loads(works("records", "info", tmp_path / "pack", "--json"))
    assert (info["images"], info["identities"], info["layout"]) == (32, 8, "insightface")
    shown = works("records", "info", tmp_path / "pack")
    assert "32" in shown
    assert ", 5th percentile " in shown
    assert "32 images, 8 identities, 0 faults" in works("records", "verify", tmp_path / "pack")


def test_published_forms_are_described_cached_and_trained_on(home: Path, tmp_path: Path) -> None:
    faces = open_records(home / "faces")
    parquet = write_form("parquets", faces, tmp_path / "hub")
    tar = write_form("tar", faces, tmp_path / "shards")
    for path, form in ((parquet, "parquet"), (tar, "webdataset")):
        info = json.loads(works("records", "info", path, "--json"))
        assert (info["images"], info["identities"], info["layout"]) == (32, 8, form)
        assert "32 images, 8 identities, 0 faults" in works("records", "verify", path)
    out, teacher = tmp_path / "targets.gkd", ("--teacher", home / "teacher.pt")
    works("cache-teacher", parquet, out, *teacher, "--centers", "class-mean")
    against = json.loads(works("targets", "verify", out, "--against", tar, *teacher, "--json"))
    assert against["ok"]
    works("records", "pack", parquet, tmp_path / "pack")
    for source in (tar, tmp_path / "pack"):
        works("train-student", source, out, tmp_path / f"run-{source.name}", *TINY)
    result = gkd("train-student", parquet, out, tmp_path / "run", *TINY, "--dry-run")
    assert result.exit_code == 0
    assert "decodes up to 7 images; run `gkd records pack" in result.stderr


def test_every_fault_of_records_is_listed(home: Path, tmp_path: Path) -> None:
    works("records", "pack", home / "faces", tmp_path / "pack")
    spoil(tmp_path / "pack" / "train.rec", row=3)
    result = gkd("records", "verify", tmp_path / "pack")
    assert result.exit_code == 1
    assert re.search(r"train\.rec, key 4, offset \d+: ", result.stdout)
    assert "32 images, 8 identities, 1 faults" in result.stdout
    report = json.loads(gkd("records", "verify", tmp_path / "pack", "--json").stdout)
    assert len(report["faults"]) == 1


def spoil(pack: Path, *, row: int) -> None:
    """Overwrite the start of one encoded image."""
    records = open_records(pack)
    content = bytearray(pack.read_bytes())
    start = content.index(bytes(records.encoded(row)))
    content[start : start + 64] = bytes(64)
    pack.write_bytes(content)


def test_corrupt_records_end_a_run_or_are_left_out(home: Path, tmp_path: Path) -> None:
    pack, out = tmp_path / "pack", tmp_path / "targets.gkd"
    works("records", "pack", home / "faces", pack)
    spoil(pack / "train.rec", row=3)
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    message = fails("cache-teacher", pack, out, *teacher)
    assert "train.rec, key 4, offset" in message
    assert "--skip-corrupt" in message

    summary = json.loads(works("cache-teacher", pack, out, *teacher, "--skip-corrupt", "--json"))
    assert summary["skipped"] == 1
    skipped = json.loads(works("targets", "info", out, "--json"))["skipped"]
    assert list(skipped) == ["4"]
    assert "expected an encoded image" in skipped["4"]
    assert ", 0 faults" in works("targets", "verify", out)
    for flag in ((), ("--without-kd",)):
        works("train-student", pack, out, tmp_path / f"run{len(flag)}", *TINY, *flag)


def test_what_is_left_out_is_shown(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "faces", tmp_path / "faces")
    (tmp_path / "faces" / "notes.md").write_text("of whom")
    line = "1 files that are no images (.md): "
    assert line in works("records", "info", tmp_path / "faces")
    assert f"left out: {line}" in works("records", "verify", tmp_path / "faces")
    result = gkd("records", "pack", tmp_path / "faces", tmp_path / "pack")
    assert result.exit_code == 0
    assert f"left out: {line}" in result.stderr


def test_a_fault_of_the_whole_pack_is_said_once_and_its_remedy_works(
    home: Path, tmp_path: Path
) -> None:
    for identity in range(3):
        for number in range(2):
            path = tmp_path / "large" / f"{identity}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(identity, (160, 160)))
    problem = "expected an aligned face of 112x112 pixels, got 160x160"
    result = gkd("records", "verify", tmp_path / "large")
    assert result.stdout.count(problem) == 1
    assert "6 images, 3 identities, 6 faults" in result.stdout
    options = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    stderr = fails("cache-teacher", tmp_path / "large", tmp_path / "c.gkd", *options)
    assert f"every image that was looked at: {problem}; if they are faces of another" in stderr
    assert problem in fails("records", "pack", tmp_path / "large", tmp_path / "pack")
    works("records", "pack", tmp_path / "large", tmp_path / "pack", "--resize")
    assert "6 images, 3 identities, 0 faults" in works("records", "verify", tmp_path / "pack")
