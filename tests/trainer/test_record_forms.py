"""A cache made from one form of the records serves every other."""

from pathlib import Path

import pytest
import torch

from gkd.storage.cache.reader import Cache
from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.trainer.data.dataset import Batch, FaceBatches, join_targets
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.data.sampler import BatchSampler
from tests.storage.records.test_forms import FORMS, write_form
from tests.trainer.faces import write_cache

SAMPLER = BatchSampler(num_images=42, batch_size=8, epochs=1, seed=1, flip=True)


def batches(records: Records, cache: Path, folder: Path, workers: int) -> list[Batch]:
    kept, targets = join_targets(records, Cache.open(cache), workers=1, folder=folder)
    assert len(kept) == 42
    dataset = FaceBatches(kept, targets, temperature=4.0)
    return list(BatchLoader(dataset, SAMPLER, workers=workers, pin=False))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_cache_serves_every_form(faces: Path, tmp_path: Path, form: str) -> None:
    folder = open_records(faces / "faces")
    copy = open_records(write_form(form, folder, tmp_path / form))
    write_cache(tmp_path / "copy.gkd", copy, ["original", "flipped"])
    expected = batches(folder, faces / "targets.gkd", tmp_path / "kept", 0)
    # The folder's cache for the copy, with workers, and the copy's cache for the folder.
    for made in (
        batches(copy, faces / "targets.gkd", tmp_path / "kept", 2),
        batches(folder, tmp_path / "copy.gkd", tmp_path / "kept", 0),
    ):
        assert len(made) == len(expected) == 5
        for ours, theirs in zip(made, expected, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.targets is not None
            assert theirs.targets is not None
            for name, value in theirs.targets.tensors().items():
                assert torch.equal(ours.targets.tensors()[name], value)
