"""Batches: each image once per epoch, with its view's targets, for any number of workers."""

import errno
import gc
import multiprocessing
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gkd.storage.cache.reader import Cache
from gkd.storage.errors import (
    ConfigError,
    CorruptRecordError,
    CorruptShardError,
    SpecMismatchError,
)
from gkd.storage.reading.shard_store import Block, ShardStore
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.trainer.data.checks import check_data
from gkd.trainer.data.dataset import (
    Batch,
    FaceBatches,
    JoinedTargets,
    Order,
    join_targets,
)
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.data.sampler import BatchIndices, BatchSampler
from gkd.trainer.loop import train
from tests.reference import log_softmax
from tests.storage.records.packs import insightface_records, write_pack
from tests.tampering import flip_bit
from tests.trainer.faces import SETTINGS, load, small_config, teacher_logits, write_cache

SAMPLER = BatchSampler(num_images=42, batch_size=8, epochs=3, seed=1, flip=True)


def batches(faces: Path, sampler: BatchSampler, workers: int = 0) -> list[Batch]:
    records, targets = load(faces)
    dataset = FaceBatches(records, targets, temperature=4.0)
    return list(BatchLoader(dataset, sampler, workers=workers, pin=False))


def test_each_epoch_shows_every_image_at_most_once_in_a_new_order() -> None:
    sampler = list(SAMPLER)
    assert len(sampler) == len(SAMPLER) == SAMPLER.total_steps == 15
    epochs = [np.concatenate([p.rows for p in sampler[i : i + 5]]) for i in (0, 5, 10)]
    for rows in epochs:
        assert len(rows) == len(set(rows.tolist())) == 40
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())


def test_any_number_of_ranks_makes_the_same_batches() -> None:
    """If the number of ranks changes within an epoch, it still shows each image once."""
    whole = list(SAMPLER)
    changes = [(0, 2), (3, 1), (7, 4), (12, 1)]  # (first step, ranks)
    for (start, ranks), (stop, _) in zip(changes, [*changes[1:], (15, 0)], strict=True):
        sampler = replace(SAMPLER, start=start, world_size=ranks)
        parts = [list(replace(sampler, rank=rank)) for rank in range(ranks)]
        for step in range(start, stop):
            rows = np.concatenate([part[step - start].rows for part in parts])
            assert sorted(rows) == sorted(whole[step].rows)
            flipped = np.concatenate([part[step - start].flipped for part in parts])
            assert set(rows[flipped]) == set(whole[step].rows[whole[step].flipped])


def test_each_epoch_mirrors_another_half_of_the_images() -> None:
    sampler = list(BatchSampler(num_images=4000, batch_size=4000, epochs=2, seed=0, flip=True))
    mirrored = [p.flipped[np.argsort(p.rows)] for p in sampler]
    assert [m.mean() for m in mirrored] == pytest.approx([0.5, 0.5], abs=0.03)
    assert (mirrored[0] != mirrored[1]).mean() == pytest.approx(0.5, abs=0.03)


def test_without_flip_nothing_is_mirrored() -> None:
    assert not any(p.flipped.any() for p in BatchSampler(42, 8, 2, 0, flip=False))


@pytest.mark.parametrize("seed", [0, 7])
def test_batches_depend_on_the_seed_alone(seed: int) -> None:
    def rows(seed: int) -> list[list[int]]:
        return [p.rows.tolist() for p in BatchSampler(42, 8, 2, seed, flip=True)]

    assert rows(seed) == rows(seed) != rows(seed + 1)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 13, 15])
def test_a_sampler_that_starts_at_a_step_gives_the_rest(step: int) -> None:
    rest = SAMPLER.starting_at(step)
    expected = list(SAMPLER)[step:]
    assert len(rest) == len(expected)
    for got, want in zip(rest, expected, strict=True):
        np.testing.assert_array_equal(got.rows, want.rows)
        np.testing.assert_array_equal(got.flipped, want.flipped)


def test_images_show_the_view_of_their_targets(faces: Path) -> None:
    """Against the dense teacher: p(T) of the view, and the images themselves."""
    records, _ = load(faces)
    both = [teacher_logits(records, "original"), teacher_logits(records, "flipped")]
    for batch, indices in zip(batches(faces, SAMPLER), SAMPLER, strict=True):
        assert batch.targets is not None
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 112, 112, 3)
        offsets = batch.targets.offsets.tolist()
        for i, (row, flipped) in enumerate(zip(indices.rows, indices.flipped, strict=True)):
            image = records.image(int(row))
            image = image[:, ::-1] if flipped else image
            np.testing.assert_array_equal(batch.images[i].numpy(), image)
            assert batch.labels[i] == records.labels[row]
            entries = slice(offsets[i], offsets[i + 1])
            log_p = log_softmax(both[int(flipped)][row].astype(np.float64) / 4.0)
            group = batch.targets.indices[entries].numpy()
            got = batch.targets.log_probs[entries].numpy()
            np.testing.assert_allclose(got, log_p[group], atol=6e-4)
            assert batch.targets.rows[entries].tolist() == [i] * len(group)
            assert np.exp(log_p[group]).sum() >= SETTINGS.threshold


def in_blocks(faces: Path, sampler: BatchSampler, workers: int = 0) -> list[Batch]:
    records, targets = load_blocks(faces)
    dataset = FaceBatches(records, targets, temperature=4.0)
    return list(BatchLoader(dataset, sampler, workers=workers, pin=False))


def load_blocks(faces: Path) -> tuple[Records, JoinedTargets]:
    records, cache = open_records(faces / "faces"), Cache.open(faces / "targets.gkd")
    return join_targets(records, cache, workers=1, folder=faces / "none", order="blocks")


def block_sampler(faces: Path, size: int = 1) -> BatchSampler:
    """Three shards of 16, 16 and 10 images; batches of 8 lie in two or three of them."""
    return replace(SAMPLER, blocks=load_blocks(faces)[1].blocks(size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_are_visited_one_after_the_other(faces: Path, size: int) -> None:
    sampler = list(block_sampler(faces, size))
    assert len(sampler) == 15
    composition = set()
    for epoch in (sampler[:5], sampler[5:10], sampler[10:]):
        rows = np.concatenate([indices.rows for indices in epoch])
        assert len(set(rows.tolist())) == 40
        blocks = np.concatenate([indices.blocks for indices in epoch if indices.blocks is not None])
        assert (np.diff(blocks) >= 0).all()
        shards = [tuple(np.unique(rows[blocks == b] // 16)) for b in np.unique(blocks)]
        assert sum(map(len, shards)) == 3
        assert {len(block) for block in shards[:-1]} <= {size}
        composition.add(tuple(shards))
        inside = rows[blocks == blocks[0]]
        assert not np.array_equal(inside, np.sort(inside))
    assert len(composition) > 1 or size == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 3, 8])
def test_blocks_give_the_same_targets_as_memory_mapped_files(
    faces: Path, workers: int, size: int, step: int
) -> None:
    sampler = block_sampler(faces, size).starting_at(step)
    got = in_blocks(faces, sampler, workers)
    assert len(got) == 15 - step
    assert_same_batches(got, batches(faces, sampler))
    assert not (faces / "none").exists()


def test_at_most_two_blocks_are_in_memory(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Block] = weakref.WeakSet()
    most = []
    load = ShardStore.load

    def counted(self: ShardStore, shards: list[int]) -> Block:
        gc.collect()
        most.append(len(alive))
        block = load(self, shards)
        alive.add(block)
        return block

    monkeypatch.setattr(ShardStore, "load", counted)
    sampler = replace(block_sampler(faces), batch_size=5, epochs=2)
    assert len(in_blocks(faces, sampler)) == 16
    assert len(most) == 6
    assert max(most) <= 2


def test_a_damaged_block_is_reported_by_its_file(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces / "targets.gkd", tmp_path / "targets.gkd")
    flip_bit(tmp_path / "targets.gkd/original/indices/c/1/0", 77)
    (tmp_path / "faces").symlink_to(faces / "faces")
    with pytest.raises(CorruptShardError, match="original/indices/c/1/0: its sha256 is not"):
        in_blocks(tmp_path, block_sampler(faces), workers=2)


def renumbered(faces: Path, home: Path, names: dict[int, str]) -> Path:
    """The same people under other names, so in another order; others are left out."""
    for old, new in names.items():
        shutil.copytree(faces / "faces" / f"person_{old}", home / "faces" / new)
    (home / "targets.gkd").symlink_to(faces / "targets.gkd")
    return home


PERMUTED = {0: "e", 1: "a", 2: "f", 3: "b", 4: "d", 5: "c"}
FILTERED = {0: "e", 2: "f", 3: "b", 5: "c"}


@pytest.mark.parametrize("order", ["full", "blocks"])
@pytest.mark.parametrize("names", [PERMUTED, FILTERED])
def test_targets_have_the_class_numbers_of_the_records(
    faces: Path, tmp_path: Path, names: dict[int, str], order: Order
) -> None:
    """Against the dense teacher, which has the cache's classes."""
    home = renumbered(faces, tmp_path, names)
    records, targets = join_targets(
        open_records(home / "faces"),
        Cache.open(home / "targets.gkd"),
        workers=1,
        folder=tmp_path,
        order=order,
    )
    assert records.num_classes == targets.num_classes == 6
    by_name = sorted(names.items(), key=lambda pair: pair[1])
    old_classes = [old for old, _ in by_name]
    old_classes += [old for old in range(6) if old not in names]
    logits = teacher_logits(open_records(faces / "faces"), "original")[targets.rows]
    log_p = log_softmax(logits[:, old_classes].astype(np.float64) / 4.0)
    sampler = BatchSampler(
        len(records), 7, 1, 0, flip=False, blocks=targets.blocks(2) if order == "blocks" else None
    )
    dataset = FaceBatches(records, targets, temperature=4.0)
    for batch in BatchLoader(dataset, sampler, workers=0, pin=False):
        assert batch.targets is not None
        entries = batch.targets
        rows = batch.rows[entries.rows].numpy()
        expected = log_p[rows, entries.indices.numpy()]
        np.testing.assert_allclose(entries.log_probs.numpy(), expected, atol=6e-4)
        for i, label in enumerate(batch.labels.tolist()):
            assert label in entries.indices[entries.rows == i].tolist()


def test_unknown_people_can_be_left_out(faces: Path, tmp_path: Path) -> None:
    home = renumbered(faces, tmp_path, {0: "a", 1: "b"})
    shutil.copytree(faces / "faces/person_2", home / "faces/new")
    for number, path in enumerate((home / "faces/new").iterdir()):
        path.write_bytes(path.read_bytes() + bytes([number]))
    records, cache = open_records(home / "faces"), Cache.open(home / "targets.gkd")
    with pytest.raises(SpecMismatchError, match=r"7 of 21 images .*--drop-unmatched"):
        join_targets(records, cache, workers=1, folder=tmp_path)
    kept, targets = join_targets(records, cache, workers=1, folder=tmp_path, drop_unmatched=True)
    assert (len(kept), targets.unmatched) == (14, 7)
    assert kept.labels.tolist() == [0] * 7 + [1] * 7


def assert_same_batches(got: list[Batch], expected: list[Batch]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for name in ("images", "labels", "rows"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert ours.targets is not None
        assert theirs.targets is not None
        for name, value in theirs.targets.tensors().items():
            assert torch.equal(getattr(ours.targets, name), value)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(faces: Path, workers: int) -> None:
    sampler = SAMPLER.starting_at(8)
    assert_same_batches(batches(faces, sampler, workers), batches(faces, sampler))


def test_without_targets_batches_have_none(faces: Path) -> None:
    records = open_records(faces / "faces")
    dataset = FaceBatches(records, None, temperature=4.0)
    indices = BatchIndices(np.arange(3), np.zeros(3, bool))
    assert dataset[indices].targets is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_reported_without_a_workers_traceback(
    faces: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(faces / "faces", tmp_path / "faces")
    (tmp_path / "faces/person_2/3.jpg").write_bytes(b"\xff\xd8 no face")
    records = open_records(tmp_path / "faces")
    dataset = FaceBatches(records, None, temperature=4.0)
    sampler = BatchSampler(num_images=42, batch_size=42, epochs=1, seed=0, flip=False)
    with pytest.raises(CorruptRecordError) as error:
        list(BatchLoader(dataset, sampler, workers=workers, pin=False))
    assert "person_2/3.jpg" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_workers_disk_error_is_raised_unchanged(
    faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FaceBatches, indices: BatchIndices) -> Batch:
        raise OSError(errno.EIO, "Input/output error", "/data/train.rec")

    monkeypatch.setattr(FaceBatches, "__getitem__", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        batches(faces, SAMPLER, workers=2)
    assert (error.value.errno, error.value.filename) == (errno.EIO, "/data/train.rec")


def test_a_bug_in_a_worker_leaves_no_process_behind(
    faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the traceback is alive: living workers would block the interpreter's exit."""

    def fail(self: FaceBatches, indices: BatchIndices) -> Batch:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FaceBatches, "__getitem__", fail)
    with pytest.raises(ZeroDivisionError, match="a bug") as error:
        batches(faces, SAMPLER, workers=2)
    assert error.tb is not None
    assert multiprocessing.active_children() == []


def test_flips_need_the_flipped_view(faces: Path, tmp_path: Path) -> None:
    records = open_records(faces / "faces")
    write_cache(tmp_path / "one.gkd", records, ["original"])
    cache = Cache.open(tmp_path / "one.gkd")
    _, targets = join_targets(records, cache, workers=1, folder=tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"of the original view only, .*shows flipped images too; set data\.flip=false",
    ):
        check_data(small_config("train.batch_size=8"), records, targets)
    check_data(small_config("train.batch_size=8", "data.flip=false"), records, targets)


@pytest.mark.parametrize("flip", ["true", "false"])
def test_a_cache_without_the_original_view_is_refused(
    faces: Path, tmp_path: Path, flip: str
) -> None:
    records = open_records(faces / "faces")
    write_cache(tmp_path / "mirror.gkd", records, ["flipped"])
    cache = Cache.open(tmp_path / "mirror.gkd")
    _, targets = join_targets(records, cache, workers=1, folder=tmp_path)
    config = small_config(f"data.flip={flip}")
    with pytest.raises(
        ConfigError,
        match=r"flipped view only, .* shows original images too; cache",
    ):
        train(config, records, targets, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_temperature_that_was_not_stored_is_refused(faces: Path) -> None:
    records, targets = load(faces)
    with pytest.raises(ConfigError, match=r"kd\.temperature: .* at 1, 4, got 3"):
        check_data(small_config("train.batch_size=8", "kd.temperature=3.0"), records, targets)


def test_less_than_one_batch_is_refused(faces: Path) -> None:
    records = open_records(faces / "faces")
    with pytest.raises(ConfigError, match="has 42 images, fewer than one batch of 43"):
        check_data(small_config("train.batch_size=43"), records, None)


def test_a_record_without_a_label_is_refused(faces: Path) -> None:
    records = open_records(faces / "faces")
    records.labels = records.labels.copy()
    records.labels[9] = -1
    with pytest.raises(ConfigError, match=r"1 records of .* the first: -1 of .*person_1.2\.jpg"):
        check_data(small_config("train.batch_size=8"), records, None)


def test_a_label_outside_the_classes_is_explained(tmp_path: Path) -> None:
    records = open_records(write_pack(tmp_path, insightface_records([3, 2, 4]), classes=2))
    with pytest.raises(ConfigError) as error:
        check_data(small_config("train.batch_size=4"), records, None)
    message = str(error.value)
    assert message.startswith(f"4 records of {tmp_path}/train.rec have no label among its 2")
    assert "key 6, offset" in message
    assert "`gkd records verify` lists them all" in message


def test_images_with_other_bytes_do_not_match(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces / "faces", tmp_path / "faces")
    image = tmp_path / "faces/person_2/3.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    cache = Cache.open(faces / "targets.gkd")
    with pytest.raises(SpecMismatchError, match="1 of 42 images"):
        join_targets(open_records(tmp_path / "faces"), cache, workers=1, folder=tmp_path)
