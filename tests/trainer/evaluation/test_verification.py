"""Verification: against a slow reading of the protocol, by hand, and on real faces."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.trainer.evaluation.bin_file import VerificationSet, load_verification_set
from gkd.trainer.evaluation.verification import (
    VerificationResult,
    evaluate,
    flip_sum_embeddings,
    module_embed,
    plot_roc,
    results_table,
    score,
)
from tests.paths import SHARED_DATA, needs_shared_data
from tests.trainer.evaluation.test_bin_file import IMAGES, ISSAME

PAIRS = VerificationSet(Path("faces.bin"), tuple(IMAGES), ISSAME)


def slow_accuracies(distances: list[float], issame: list[bool]) -> tuple[list[float], list[float]]:
    """The protocol as arcface_torch states it, in loops: folds as sklearn's KFold cuts them."""
    total = len(distances)
    folds: list[list[int]] = []
    for fold in range(10):
        start = sum(map(len, folds))
        folds.append(list(range(start, start + total // 10 + (1 if fold < total % 10 else 0))))
    thresholds = [float(t) for t in np.arange(0, 4, 0.01)]

    def accuracy(rows: list[int], threshold: float) -> float:
        return sum((distances[row] < threshold) == issame[row] for row in rows) / len(rows)

    accuracies, chosen = [], []
    for test in folds:
        training = [row for row in range(total) if row not in test]
        best = max(thresholds, key=lambda threshold: accuracy(training, threshold))  # first maximum
        accuracies.append(accuracy(test, best))
        chosen.append(best)
    return accuracies, chosen


def slow_tar(distances: list[float], issame: list[bool], bound: float) -> float:
    genuine = [d for d, same in zip(distances, issame, strict=True) if same]
    impostors = [d for d, same in zip(distances, issame, strict=True) if not same]
    best = 0.0
    for threshold in distances:
        if sum(d <= threshold for d in impostors) <= bound * len(impostors) + 1e-9:
            best = max(best, sum(d <= threshold for d in genuine) / len(genuine))
    return best


@st.composite
def scored_pairs(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    count = draw(st.integers(10, 47))
    steps = draw(st.lists(st.integers(0, 80), min_size=count, max_size=count))
    issame = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [step / 20 for step in steps], [True, False, *issame[2:]]


@given(scored_pairs())
def test_agrees_with_the_slow_reading(pairs: tuple[list[float], list[bool]]) -> None:
    distances, issame = pairs
    result = score(np.array(distances), np.array(issame), name="made")
    accuracies, thresholds = slow_accuracies(distances, issame)
    np.testing.assert_allclose(result.accuracy, np.mean(accuracies), rtol=1e-12)
    np.testing.assert_allclose(result.accuracy_std, np.std(accuracies), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(result.thresholds, thresholds)
    impostors = issame.count(False)
    for bound, tar in result.tar_at_far.items():
        if impostors * bound < 0.999:
            assert tar is None
        else:
            assert tar == pytest.approx(slow_tar(distances, issame, bound))
    # The area is the chance that a genuine pair is the closer one, ties counted half.
    wins = [
        (genuine < impostor) + (genuine == impostor) / 2
        for genuine, same in zip(distances, issame, strict=True)
        for impostor, other in zip(distances, issame, strict=True)
        if same and not other
    ]
    assert result.auc == pytest.approx(np.mean(wins))
    assert 0 <= result.eer <= 1


def test_by_hand() -> None:
    # Ten folds of two pairs. One genuine pair stands at 1.5, among the impostors at 1.2 and 2.
    distances = np.array([0.5, 2.0] * 10)
    issame = np.array([True, False] * 10)
    distances[0] = 1.5
    distances[19] = 1.2
    result = score(distances, issame, name="hand")
    # 0.51 is the first threshold above 0.5. Folds 1 to 9 are trained with the genuine pair at 1.5
    # in sight: 0.51 loses one pair; nothing does better but 1.51 without the last fold's impostor.
    assert result.thresholds.tolist() == pytest.approx([0.51] * 9 + [1.51])
    # Fold 0 loses its genuine pair; fold 9, judged at 1.51, its impostor.
    assert result.accuracy == pytest.approx((8 * 1 + 2 * 0.5) / 10)
    assert result.accuracy_std == pytest.approx(np.sqrt(0.8 * 0.01 + 0.2 * 0.16))
    assert result.tar_at_far == {
        1e-1: 1.0,
        1e-2: None,
        1e-3: None,
        1e-4: None,
        1e-5: None,
        1e-6: None,
    }
    # 99 of the 100 (genuine, impostor) pairs are in order.
    assert result.auc == pytest.approx(0.99)
    # Below 1.2 one genuine pair of ten is lost, at 1.2 one impostor of ten gets in: both a tenth.
    assert result.eer == pytest.approx(0.1)
    assert (result.genuine_pairs, result.impostor_pairs) == (10, 10)
    assert json.loads(json.dumps(result.to_builtins())) == {
        "name": "hand",
        "genuine_pairs": 10,
        "impostor_pairs": 10,
        "accuracy": pytest.approx(0.9),
        "accuracy_std": pytest.approx(0.2),
        "thresholds": [0.51] * 9 + [1.51],
        "one_sided_folds": 0,
        "tar_at_far": {
            "1e-01": 1.0,
            **dict.fromkeys(["1e-02", "1e-03", "1e-04", "1e-05", "1e-06"]),
        },
        "auc": pytest.approx(0.99),
        "eer": pytest.approx(0.1),
    }


def test_pairs_told_apart_and_pairs_told_wrong() -> None:
    issame = np.arange(40) % 2 == 0
    perfect = score(np.where(issame, 0.3, 1.7), issame, name="perfect")
    assert (perfect.accuracy, perfect.auc, perfect.eer) == (1.0, 1.0, 0.0)
    wrong = score(np.where(issame, 1.7, 0.3), issame, name="wrong")
    assert (wrong.auc, wrong.eer, wrong.tar_at_far[1e-1]) == (0.0, 1.0, 0.0)


def pixel_embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Means of a 4x4 grid: the mirror image has another embedding."""
    cells = images.reshape(len(images), 4, 28, 4, 28, 3).mean(axis=(2, 4))
    return np.asarray(cells.reshape(len(images), -1) - 127, np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_embeddings_sum_both_views_before_normalising(batch_size: int) -> None:
    embeddings = flip_sum_embeddings(pixel_embed, PAIRS, batch_size=batch_size)
    for number in range(20):
        image = PAIRS.image(number)
        summed = (
            pixel_embed(image[None])[0].astype(np.float64) + pixel_embed(image[None, :, ::-1])[0]
        )
        np.testing.assert_allclose(
            embeddings[number], summed / np.sqrt((summed**2).sum()), rtol=1e-6
        )


def test_a_face_of_several_pairs_is_embedded_once() -> None:
    images = (*IMAGES[:10], IMAGES[3], IMAGES[0], *IMAGES[10:17], IMAGES[3])
    pairs = VerificationSet(Path("faces.bin"), images, ISSAME)
    seen = []

    def embed(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        seen.append(len(batch))
        return pixel_embed(batch)

    got = flip_sum_embeddings(embed, pairs, batch_size=8)
    assert sum(seen) == 2 * 17
    alone = flip_sum_embeddings(pixel_embed, PAIRS, batch_size=8)
    np.testing.assert_array_equal(got, alone[[*range(10), 3, 0, *range(10, 17), 3]])


def test_evaluate_joins_embedding_and_scoring() -> None:
    result = evaluate(pixel_embed, PAIRS)
    embeddings = flip_sum_embeddings(pixel_embed, PAIRS, batch_size=20)
    distances = [
        float(((a - b) ** 2).sum()) for a, b in zip(embeddings[::2], embeddings[1::2], strict=True)
    ]
    accuracies, _ = slow_accuracies(distances, ISSAME.tolist())
    assert result.name == "faces"
    assert result.accuracy == pytest.approx(np.mean(accuracies))


def test_undecodable_image_is_named() -> None:
    images = (*IMAGES[:13], b"junk", *IMAGES[14:])
    with pytest.raises(CorruptRecordError, match=r"faces.bin, image 13 of 20 \(pair 6\)"):
        evaluate(pixel_embed, VerificationSet(Path("faces.bin"), images, ISSAME), batch_size=4)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.where(images[:, :1, 0, 0] % 2 == 0, np.nan, pixel_embed(images))

    with pytest.raises(ConfigError, match=r"faces.bin: .* not finite, the first is image \d+"):
        evaluate(embed, PAIRS)


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("name", ["arcface", "imagenet", "raw"])
def test_module_embed_preprocesses_as_the_preset_says(name: str, bgr: bool) -> None:
    preprocess = preprocess_preset(name, bgr=bgr)
    images = np.stack([PAIRS.image(number) for number in range(3)])
    got = module_embed(nn.Flatten(), preprocess, torch.device("cpu"))(images)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, preprocess.apply(images).reshape(3, -1))  # to the bit


def test_module_embed_casts_where_asked() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 112 * 112, 4))
    preprocess = preprocess_preset("arcface")
    images = np.stack([PAIRS.image(number) for number in range(3)])
    full = module_embed(linear, preprocess, torch.device("cpu"))(images)
    low = module_embed(linear, preprocess, torch.device("cpu"), "bfloat16")(images)
    assert low.dtype == np.float32
    assert 0 < np.abs(low - full).max() < 0.05
    with pytest.raises(
        ConfigError, match="precision: expected float32, bfloat16, float16, got 'int8'"
    ):
        module_embed(linear, preprocess, torch.device("cpu"), "int8")


def test_table_shows_what_can_be_told() -> None:
    results = []
    for name, pairs in (("small", 40), ("large", 400)):
        issame = np.arange(pairs) % 2 == 0
        results.append(score(np.where(issame, 0.3, 1.7), issame, name=name))
    shown = io.StringIO()
    Console(file=shown, width=200).print(results_table(results))
    *_, heading, _, small, large, _ = (
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in shown.getvalue().splitlines()
    )
    # No set can tell a rate of one in a thousand, the small one not even one in a hundred.
    assert heading[-2:] == ["TAR at 1e-01", "TAR at 1e-02"]
    told = ["100.00%", "0.00%", "1.0000", "0.00%", "100.00%"]
    assert small == ["small", "40", *told, "-"]
    assert large == ["large", "400", *told, "100.00%"]


def test_plot_is_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    issame = np.arange(200) % 2 == 0
    results: list[VerificationResult] = [
        score(rng.normal(np.where(issame, 1, mean), 0.4).clip(0, 4), issame, name=f"set {mean}")
        for mean in (1.5, 2.5)
    ]
    for name in ("roc.png", "roc.xyz", "roc"):
        plot_roc(results, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_plot_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[plot\]'"):
        plot_roc([], tmp_path / "roc.png")


@needs_shared_data
def test_shared_teacher_is_right_on_every_real_pair() -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        str(SHARED_DATA / "teachers/mobilefacenet.onnx"),
        options,
        providers=["CPUExecutionProvider"],
    )
    preprocess = preprocess_preset("imagenet")

    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(session.run(None, {"input0": preprocess.apply(images)})[0])

    result = evaluate(embed, load_verification_set(SHARED_DATA / "lfw/lfw_fold9.bin"))
    assert result.accuracy == 1.0
    assert result.tar_at_far[1e-2] == 1.0
    assert result.tar_at_far[1e-3] is None
    assert result.auc == 1.0


def test_folds_of_one_kind_are_counted() -> None:
    distances = np.linspace(0.1, 3.9, 40)
    alternating = np.arange(40) % 2 == 0
    assert score(distances, alternating, name="fair").one_sided_folds == 0
    assert score(distances, distances < 2, name="sorted").one_sided_folds == 10
