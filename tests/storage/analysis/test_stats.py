import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gkd.storage.analysis.stats import QUANTILES, plot_stats, stats
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import VIEWS
from gkd.storage.cache.writer import CacheWriter
from gkd.storage.errors import ConfigError, IncompleteCacheError
from tests.caches import dense_targets, labels_of, make_cache, make_logits, make_spec

SKIPPED = {7: "no image", 60: "no image"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "faces.gkd", skipped=SKIPPED)


def test_statistics_agree_with_the_dense_targets(cache: Cache) -> None:
    found = stats(cache)
    spec, labels = cache.spec, labels_of(cache.spec)
    kept = ~np.isin(np.arange(spec.num_samples), list(SKIPPED))
    for number, view in enumerate(VIEWS):
        targets, cut = dense_targets(make_logits(spec, view), labels, spec)
        figures = found.views[number]
        sizes = targets.sizes[kept]
        assert figures.view == view
        assert (figures.samples, figures.skipped) == (98, 2)
        assert figures.entries == sizes.sum()
        assert figures.truncated == cut
        assert (figures.min_size, figures.max_size) == (sizes.min(), sizes.max())
        assert figures.mean_size == pytest.approx(sizes.mean())
        assert figures.median_size == np.quantile(sizes, 0.5, method="inverted_cdf")
        assert figures.p95_size == np.quantile(sizes, 0.95, method="inverted_cdf")
        assert dict(figures.histogram) == dict(
            np.array(np.unique(sizes, return_counts=True)).T.tolist()
        )
        for column, temperature in enumerate(spec.temperatures):
            masses = np.exp(targets.secondary[kept, column].astype(np.float64))
            got = figures.secondary[temperature]
            assert got.mean == pytest.approx(masses.mean(), rel=1e-3)
            for quantile, value in zip(QUANTILES, got.quantiles, strict=True):
                bounds = [np.quantile(masses, quantile, method=m) for m in ("lower", "higher")]
                assert bounds[0] * 0.999 <= value <= bounds[1] * 1.001
        rows = np.repeat(np.arange(spec.num_samples), targets.sizes)
        is_label = (targets.indices == labels[rows]) & kept[rows]
        probs = 2.0 ** (-targets.log2_probs[is_label].astype(np.float64) / 1024)
        assert len(probs) == 98
        assert figures.label.mean == pytest.approx(probs.mean(), rel=1e-5)


def test_bytes_are_those_of_the_files(cache: Cache) -> None:
    found = stats(cache)
    assert found.id == cache.id
    for figures in found.views:
        for name, size in figures.array_bytes.items():
            chunks = (cache.path / figures.view / name / "c").rglob("*")
            assert size == sum(file.stat().st_size for file in chunks if file.is_file())
        assert figures.bytes_per_sample == sum(figures.array_bytes.values()) / 100
    files = [file for file in cache.path.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files if file.name != "manifest.json")
    assert found.bytes == total
    assert found.bytes_per_sample == total / 100


def test_a_group_with_all_mass_leaves_none(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "one.gkd", num_classes=1)
    for view in stats(cache).views:
        for mass in view.secondary.values():
            assert (mass.mean, set(mass.quantiles)) == (0.0, {0.0})


def test_statistics_are_json(cache: Cache) -> None:
    assert "secondary" in json.dumps(dataclasses.asdict(stats(cache)), default=str)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "c", make_spec())
    with pytest.raises(IncompleteCacheError, match="0 of 3 shards"):
        stats(Cache.open(writer.path, complete=False))


@pytest.mark.parametrize("num_classes", [1, 50])
def test_the_plot_is_a_picture(tmp_path: Path, num_classes: int) -> None:
    cache = make_cache(tmp_path / "c", num_samples=20, num_classes=num_classes)
    plot_stats(stats(cache), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_a_plot_that_cannot_be_written_is_refused_before_it_is_drawn(
    cache: Cache, tmp_path: Path
) -> None:
    found = stats(cache)
    missing = tmp_path / "gone" / "plot.png"
    with pytest.raises(
        ConfigError, match=rf"^{missing}: expected .*, got no such folder as .*; choose"
    ):
        plot_stats(found, missing)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: expected .*, got a folder; choose"):
        plot_stats(found, tmp_path)
