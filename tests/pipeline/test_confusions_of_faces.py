"""Label errors planted among real faces are found from the cache of a real teacher."""

from pathlib import Path

import numpy as np

from gkd.pipeline.centers.load import CLASS_MEAN
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import CacheSettings
from gkd.storage.analysis.confusions import confusions
from gkd.storage.cache.reader import Cache
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from tests.paths import SHARED_DATA, needs_shared_data
from tests.planted import RememberingTeacher, figures, plant


def few_faces() -> Subset:
    """A part of the LFW pack: 36 identities of 4 or 5 images, 3 of 8 or 9, 30 of one."""
    records = open_records(SHARED_DATA / "lfw")
    counts = np.bincount(records.labels)
    few = np.flatnonzero((counts >= 4) & (counts <= 5))[:36]
    more = np.flatnonzero((counts >= 8) & (counts <= 9))[:3]
    single = np.flatnonzero(counts == 1)[:30]
    rows = np.flatnonzero(np.isin(records.labels, np.concatenate([few, more, single])))
    part = Subset(records, rows)
    part.labels = np.unique(part.labels, return_inverse=True)[1]
    part.num_classes = int(part.labels.max()) + 1
    return part


@needs_shared_data
def test_planted_errors_are_found(tmp_path: Path) -> None:
    planted = plant(few_faces(), seed=0, swaps=30, splits=2)
    settings = CacheSettings(views=("original",))
    cache_teacher(planted.records, tmp_path / "c.gkd", RememberingTeacher(), CLASS_MEAN, settings)
    found = figures(confusions(Cache.open(tmp_path / "c.gkd")), planted)
    assert found["swapped labels among the first 100"] >= 27
    assert found["of them named after their own identity"] >= 27
    assert found["lowest rank of a split identity"] <= 10
