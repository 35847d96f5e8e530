import math
from typing import Any

import msgspec
import numpy as np
import pytest

from gkd.storage.cache.spec import (
    PRESETS,
    CacheSpec,
    DrawsSpec,
    custom_preprocess,
    preprocess_options,
    preprocess_preset,
)
from gkd.storage.errors import ConfigError
from tests.caches import make_spec


def test_a_spec_survives_json() -> None:
    spec = make_spec(draws=DrawsSpec(16, 4.0, "primary"))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=CacheSpec) == spec


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 2, "format: expected 1, .* got 2"),
        ("num_samples", 0, "num_samples: expected 1 or more, got 0"),
        ("num_classes", 2**32 + 1, "num_classes: expected 1 to 2\\^32, got 4294967297"),
        ("shard_samples", 0, "shard_samples: expected 1 to 2\\^24, .*, got 0"),
        ("max_group", 65536, "max_group: expected 1 to 65535, got 65536"),
        ("threshold", 1.5, "threshold: expected 0 to 1, got 1.5"),
        ("group_temperature", 0.0, "group_temperature: expected a positive .* got 0.0"),
        ("group_temperature", float("nan"), "group_temperature: expected .* got nan"),
        ("temperatures", (), "temperatures: expected one or more .* got \\(\\)"),
        ("temperatures", (2.0, 2.0), "temperatures: expected one or more different"),
        ("scale", float("inf"), "scale: expected a positive finite number, got inf"),
        ("margin", float("nan"), "margin: expected a finite number, got nan"),
        ("views", ("flipped", "original"), "views: expected original, flipped or both"),
        ("draws", DrawsSpec(0, 1.0, "all"), "draws: expected 1 or more draws"),
        ("draws", DrawsSpec(1 << 24, 1.0, "all"), "times temperatures or draws at most"),
    ],
)
def test_numbers_that_the_format_cannot_hold_are_refused(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(make_spec(), **{field: value})


def test_shards_cover_the_samples_once() -> None:
    spec = make_spec(num_samples=100, shard_samples=40)
    assert spec.num_shards == 3
    rows = [row for shard in range(3) for row in spec.shard_rows(shard)]
    assert rows == list(range(100))


@pytest.mark.parametrize("bgr", [False, True])
def test_presets_normalise_as_their_names_say(bgr: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    channels = images[..., ::-1] if bgr else images
    planes = channels.transpose(0, 3, 1, 2).astype(np.float64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if bgr:
        mean, std = mean[::-1], std[::-1]
    expected = {
        "arcface": (planes / 255 - 0.5) / 0.5,
        "imagenet": (planes / 255 - mean[:, None, None]) / std[:, None, None],
        "raw": planes,
    }
    for name, values in expected.items():
        got = preprocess_preset(name, bgr=bgr).apply(images)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_allclose(got, values, atol=2e-6, rtol=1e-5)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected one of arcface, .*, got 'caffe'"):
        preprocess_preset("caffe")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bgr", [False, True])
def test_options_choose_the_preprocessing_that_they_describe(name: str, bgr: bool) -> None:
    preset = preprocess_preset(name, bgr=bgr)
    assert preprocess_options(preset) == f"--preprocess {name}" + " --bgr" * bgr
    custom = msgspec.structs.replace(preset, name="custom")
    words = preprocess_options(custom).split()
    mean, std = (tuple(map(float, words[i].split(","))) for i in (1, 3))
    again = custom_preprocess(mean, std, bgr="--bgr" in words)
    np.testing.assert_allclose(again.mean + again.std, custom.mean + custom.std, rtol=1e-8)


def test_means_of_pixels_up_to_one_are_those_of_pixels_up_to_255() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given = custom_preprocess(mean, std, pixel_max=1.0)
    preset = preprocess_preset("imagenet")
    np.testing.assert_allclose(given.mean + given.std, preset.mean + preset.std)
    assert custom_preprocess([0.5], [0.5], pixel_max=1.0).mean == (127.5, 127.5, 127.5)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([1.0, 2.0], [1.0], "one or three numbers for --mean, got 1, 2"),
        ([0.0], [0.0], "one or three numbers for --std, above 0, got 0"),
        ([math.nan], [1.0], "for --mean, got nan"),
    ],
)
def test_impossible_ranges_are_refused(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_preprocess(mean, std)
