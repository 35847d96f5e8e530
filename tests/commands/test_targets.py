"""Deriving, joining, reading and collecting caches, as a user types it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gkd.demo.synthetic import draw_faces
from gkd.storage.cache.reader import Cache
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.storage.records.recordio import encode_record, record_writer
from gkd.trainer.backbones import build_backbone
from gkd.trainer.checkpoint import read_checkpoint
from tests.commands.running import TINY, fails, gkd, works

pytestmark = pytest.mark.usefixtures("materialised")

# Half a step of the stored codes, as a natural logarithm.
ROUNDING = np.log(2) / 2048


def cache_teacher(home: Path, records: Path, out: Path, *options: object) -> Path:
    centers = ("--centers", home / "centers.npy")
    small = ("--batch-size", 8, "--shard-samples", 10)
    works(
        *("cache-teacher", records, out, "--teacher", home / "teacher.pt"),
        *(*centers, *small, *options),
    )
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of eight people, a teacher, its centres and its cache, with wide groups."""
    home = tmp_path_factory.mktemp("home")
    draw_faces(home / "faces", identities=range(8), images_each=4, seed=0, workers=1)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(teacher.state_dict(), home / "teacher.pt")
    np.save(home / "centers.npy", np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32))
    cache_teacher(home, home / "faces", home / "targets.gkd", "--threshold", 0.99)
    return home


def test_a_retargeted_cache_is_that_of_a_fresh_run(home: Path, tmp_path: Path) -> None:
    options = ("--threshold", 0.8, "--max-group", 3, "--temperatures", "4,2")
    terms = ("--licence", "As that of faces.", "--note", "For small students.")
    derived_path = tmp_path / "derived.gkd"
    output = works("targets", "retarget", home / "targets.gkd", derived_path, *options, *terms)
    fresh = Cache.open(cache_teacher(home, home / "faces", tmp_path / "fresh.gkd", *options))
    derived = Cache.open(derived_path)
    assert derived.id in output
    card = (derived_path / "README.md").read_text()
    assert "As that of faces." in card
    assert "For small students." in card
    assert f"by retarget, from `{Cache.open(home / 'targets.gkd').id}`" in card
    # What is not given stays as it was: the words of the first, in a cache of the second.
    again = tmp_path / "again.gkd"
    works("targets", "retarget", derived_path, again, "--max-group", 2, "--note", "For tiny ones.")
    card = (again / "README.md").read_text()
    assert "As that of faces." in card
    assert "For tiny ones." in card
    assert "For small students." not in card
    assert "0 faults" in works("targets", "verify", again, "--deep")
    assert "0 faults" in works("targets", "verify", derived.path)
    assert derived.spec.temperatures == fresh.spec.temperatures == (4.0, 2.0)
    for shard in range(4):
        for view in fresh.spec.views:
            ours, theirs = derived.read_shard(shard, view), fresh.read_shard(shard, view)
            np.testing.assert_array_equal(ours.indices, theirs.indices)
            np.testing.assert_array_equal(ours.offsets, theirs.offsets)
            np.testing.assert_array_equal(ours.log2_probs, theirs.log2_probs)
            np.testing.assert_allclose(ours.secondary, theirs.secondary, atol=3 * ROUNDING)
    assert derived.manifest is not None
    assert fresh.manifest is not None
    assert derived.manifest.truncated == fresh.manifest.truncated


def test_retargeting_that_is_not_exact_is_refused(home: Path, tmp_path: Path) -> None:
    retarget = ("targets", "retarget", home / "targets.gkd", tmp_path / "out.gkd")
    assert "--threshold 0.995: " in fails(*retarget, "--threshold", 0.995)
    assert "stored at 1, 2, 4 only" in fails(*retarget, "--temperatures", "3")
    assert "--group-temperature 4: " in fails(*retarget, "--group-temperature", 4)
    assert not (tmp_path / "out.gkd").exists()


def write_part(folder: Path, records: Records, people: range) -> Path:
    """A pack of some of the people, in the numbering of all."""
    folder.mkdir()
    with record_writer(folder / "train.rec") as write:
        for row in np.flatnonzero(np.isin(records.labels, people)).tolist():
            record = encode_record(float(records.labels[row]), records.encoded(row), id=row)
            write(row, record)
    (folder / "property").write_text(f"{records.num_classes},112,112\n")
    return folder


def test_caches_of_parts_are_merged_and_train(home: Path, tmp_path: Path) -> None:
    """Two packs of four people each, in one numbering of eight."""
    caches = []
    for name, people in (("low", range(4)), ("high", range(4, 8))):
        folder = write_part(tmp_path / name, open_records(home / "faces"), people)
        cache = tmp_path / f"{name}.gkd"
        terms = ("--licence", f"That of {name}.", "--note", "Some of eight people.")
        caches.append(cache_teacher(home, folder, cache, "--threshold", 0.99, *terms))
    output = works("targets", "merge", tmp_path / "all.gkd", *caches)
    merged = Cache.open(tmp_path / "all.gkd")
    assert merged.id in output
    assert merged.spec.num_samples == 32
    card = (merged.path / "README.md").read_text()
    assert "by merge, from" in card
    assert "## Terms\n\nOf cache 1: That of low.\n\nOf cache 2: That of high.\n\n" in card
    assert "\n\nSome of eight people.\n\n## What is in it" in card
    assert "0 faults" in works("targets", "verify", merged.path)
    reference = Cache.open(home / "targets.gkd")
    for shard in range(4):
        for view in merged.spec.views:
            ours, theirs = merged.read_shard(shard, view), reference.read_shard(shard, view)
            np.testing.assert_array_equal(ours.indices, theirs.indices)
            np.testing.assert_allclose(ours.secondary, theirs.secondary, atol=1e-4)
    works("train-student", home / "faces", merged.path, tmp_path / "run", *TINY)
    message = fails("targets", "merge", tmp_path / "twice.gkd", caches[0], caches[0])
    assert "the same cache 2 times" in message


def test_a_run_in_blocks_needs_no_disk_and_resumes(
    home: Path, tmp_path: Path, materialised: Path
) -> None:
    train = ("train-student", home / "faces", home / "targets.gkd")
    blocks = (*TINY, "--set", "data.order=blocks", "--set", "data.block_shards=2")
    works(*train, tmp_path / "run", *blocks)
    assert not list(materialised.glob("*/original*"))
    state = read_checkpoint(tmp_path / "run/checkpoints/last.pt")
    assert state["data"][-1] == Cache.open(home / "targets.gkd").id
    message = fails(*train, tmp_path / "run", *TINY)
    assert "data.order: was blocks, now full" in message


def test_unknown_images_are_left_out_on_request(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "faces", tmp_path / "faces")
    image = next((tmp_path / "faces").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    train = ("train-student", tmp_path / "faces", home / "targets.gkd", tmp_path / "run", *TINY)
    message = fails(*train)
    assert "1 of 32 images" in message
    assert image.name in message
    left_out = gkd(*train, "--drop-unmatched").stderr
    assert "1 images without targets are left out, 31 remain" in left_out
    described = json.loads((tmp_path / "run/run.json").read_text())
    assert described["dataset"]["num_images"] == 31


def test_renamed_people_train_in_their_own_numbering(home: Path, tmp_path: Path) -> None:
    people = sorted((home / "faces").iterdir())
    for place, person in enumerate(people):
        shutil.copytree(person, tmp_path / "faces" / f"{(place * 3) % 8}")
    works("train-student", tmp_path / "faces", home / "targets.gkd", tmp_path / "run", *TINY)


def test_a_cache_of_one_view_trains_as_its_card_says(home: Path, tmp_path: Path) -> None:
    works("targets", "pull", home / "targets.gkd", tmp_path / "one.gkd", "--views", "original")
    assert "--set data.flip=false`" in (tmp_path / "one.gkd/README.md").read_text()
    train = ("train-student", home / "faces", tmp_path / "one.gkd", tmp_path / "run", *TINY)
    assert "data.flip: the cache holds targets of the original view only" in fails(*train)
    works(*train, "--set", "data.flip=false")
    works("targets", "pull", home / "targets.gkd", tmp_path / "two.gkd", "--views", "flipped")
    assert "cannot use it" in (tmp_path / "two.gkd/README.md").read_text()


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("order", ["full", "blocks"])
def test_a_cache_that_lost_a_file_is_not_trained_on(
    home: Path, tmp_path: Path, damage: str, order: str
) -> None:
    """Even if its targets are already materialised."""
    path = Path(shutil.copytree(home / "targets.gkd", tmp_path / "targets.gkd"))
    reading = (*TINY, "--set", f"data.order={order}")
    train = ("train-student", home / "faces", path, tmp_path / "run", *reading)
    works(*train)
    file = path / "flipped/log2_probs/c/1/0"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-1])
    stderr = fails(*train)
    assert f"{file}: {'missing' if damage == 'missing' else 'expected'}" in stderr
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    works(*train)


def test_a_damaged_store_is_materialised_again(
    home: Path, tmp_path: Path, materialised: Path
) -> None:
    train = ("train-student", home / "faces", home / "targets.gkd")
    works(*train, tmp_path / "run", *TINY)
    (indices,) = materialised.glob("*/original+flipped/indices.npy")
    content = indices.read_bytes()
    indices.write_bytes(content[: len(content) // 2])
    works(*train, tmp_path / "again", *TINY)
    assert indices.read_bytes() == content


def test_nothing_is_made_inside_a_cache(home: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(home / "targets.gkd", tmp_path / "targets.gkd"))
    inside, teacher = path / "inner", ("--teacher", home / "teacher.pt")
    for command in (
        ("cache-teacher", home / "faces", inside, *teacher, "--centers", home / "centers.npy"),
        ("targets", "retarget", home / "targets.gkd", inside, "--threshold", 0.5),
        ("targets", "merge", inside, home / "targets.gkd", path),
        ("targets", "pull", home / "targets.gkd", inside),
        ("targets", "push", home / "targets.gkd", inside),
        ("targets", "confusions", home / "targets.gkd", "--out", inside),
        ("centers", "build", home / "faces", inside.with_suffix(".safetensors"), *teacher),
        ("train-student", home / "faces", home / "targets.gkd", inside, *TINY),
    ):
        stderr = fails(*command)
        assert f"inside the cache {path}" in stderr or "the same cache 2 times" in stderr
    assert "0 faults" in works("targets", "verify", path)


def test_a_run_folder_that_cannot_be_written_is_an_error(home: Path) -> None:
    stderr = fails("train-student", home / "faces", home / "targets.gkd", "/sys/gkd-run", *TINY)
    assert "/sys/gkd-run: cannot be read or written (" in stderr
    assert "choose a folder that you may write to" in stderr


def test_gc_deletes_what_training_left(home: Path, tmp_path: Path, materialised: Path) -> None:
    works("train-student", home / "faces", home / "targets.gkd", tmp_path / "run", *TINY)
    id = Cache.open(home / "targets.gkd").id
    store = materialised / id / "original+flipped"
    assert "kept, used within 1 days" in works("targets", "gc", "--older-than", 1)
    assert f"{store}: would be deleted" in works("targets", "gc", "--dry-run")
    assert store.exists()
    (found,) = json.loads(works("targets", "gc", "--json"))
    assert (found["path"], found["removed"]) == (str(store), True)
    assert not store.exists()
    assert works("targets", "gc").strip() == "0 bytes freed"
