"""Verification against a naive implementation of the protocol, by hand, and on real faces."""

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
from gkd.trainer.evaluation.embed import Embed, evaluate, flip_sums, module_embed
from gkd.trainer.evaluation.results import result_tables
from gkd.trainer.evaluation.roc import plot_roc
from gkd.trainer.evaluation.verification import VerificationResult, score
from tests.paths import SHARED_DATA, needs_shared_data
from tests.trainer.evaluation.networks import grid_embed
from tests.trainer.evaluation.test_bin_file import IMAGES, ISSAME

PAIRS = VerificationSet(Path("faces.bin"), tuple(IMAGES), ISSAME)


def naive_accuracies(distances: list[float], issame: list[bool]) -> tuple[list[float], list[float]]:
    """The protocol of arcface_torch, in loops, with the folds of sklearn's KFold."""
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


def naive_tar(distances: list[float], issame: list[bool], bound: float) -> float:
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
def test_agrees_with_the_naive_implementation(pairs: tuple[list[float], list[bool]]) -> None:
    distances, issame = pairs
    result = score(np.array(distances), np.array(issame), name="made")
    accuracies, thresholds = naive_accuracies(distances, issame)
    np.testing.assert_allclose(result.accuracy, np.mean(accuracies), rtol=1e-12)
    np.testing.assert_allclose(result.accuracy_std, np.std(accuracies), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(result.thresholds, thresholds)
    impostors = issame.count(False)
    for bound, tar in result.tar_at_far.items():
        if impostors * bound < 0.999:
            assert tar is None
        else:
            assert tar == pytest.approx(naive_tar(distances, issame, bound))
    # The area is the probability that a genuine pair is the closer one, ties counted half.
    wins = [
        (genuine < impostor) + (genuine == impostor) / 2
        for genuine, same in zip(distances, issame, strict=True)
        for impostor, other in zip(distances, issame, strict=True)
        if same and not other
    ]
    assert result.auc == pytest.approx(np.mean(wins))
    assert 0 <= result.eer <= 1


def test_by_hand() -> None:
    # Ten folds of two pairs. One genuine pair is at 1.5, between the impostors at 1.2 and 2.
    distances = np.array([0.5, 2.0] * 10)
    issame = np.array([True, False] * 10)
    distances[0] = 1.5
    distances[19] = 1.2
    result = score(distances, issame, name="hand")
    # 0.51 is the first threshold above 0.5. The training data of folds 1 to 9 contain the genuine
    # pair at 1.5: 0.51 loses one pair, and only without the last fold's impostor is 1.51 better.
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


def test_perfect_and_inverted_distances() -> None:
    issame = np.arange(40) % 2 == 0
    perfect = score(np.where(issame, 0.3, 1.7), issame, name="perfect")
    assert (perfect.accuracy, perfect.auc, perfect.eer) == (1.0, 1.0, 0.0)
    wrong = score(np.where(issame, 1.7, 0.3), issame, name="wrong")
    assert (wrong.auc, wrong.eer, wrong.tar_at_far[1e-1]) == (0.0, 1.0, 0.0)


def embedded(embed: Embed, pairs: VerificationSet, batch_size: int) -> npt.NDArray[np.float64]:
    return pairs.unit_embeddings(flip_sums(embed, pairs, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_embeddings_sum_both_views_before_normalising(batch_size: int) -> None:
    embeddings = embedded(grid_embed, PAIRS, batch_size)
    for number in range(20):
        image = PAIRS.image(number)
        summed = grid_embed(image[None])[0].astype(np.float64) + grid_embed(image[None, :, ::-1])[0]
        np.testing.assert_allclose(
            embeddings[number], summed / np.sqrt((summed**2).sum()), rtol=1e-6
        )


def test_a_face_of_several_pairs_is_embedded_once() -> None:
    images = (*IMAGES[:10], IMAGES[3], IMAGES[0], *IMAGES[10:17], IMAGES[3])
    pairs = VerificationSet(Path("faces.bin"), images, ISSAME)
    seen = []

    def embed(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        seen.append(len(batch))
        return grid_embed(batch)

    got = embedded(embed, pairs, 8)
    assert sum(seen) == 2 * 17
    alone = embedded(grid_embed, PAIRS, 8)
    np.testing.assert_array_equal(got, alone[[*range(10), 3, 0, *range(10, 17), 3]])


def test_evaluate_embeds_and_scores() -> None:
    result = evaluate(grid_embed, PAIRS)
    embeddings = embedded(grid_embed, PAIRS, 20)
    distances = [
        float(((a - b) ** 2).sum()) for a, b in zip(embeddings[::2], embeddings[1::2], strict=True)
    ]
    accuracies, _ = naive_accuracies(distances, ISSAME.tolist())
    assert result.name == "faces"
    assert result.accuracy == pytest.approx(np.mean(accuracies))


def test_an_undecodable_image_is_named() -> None:
    images = (*IMAGES[:13], b"junk", *IMAGES[14:])
    with pytest.raises(CorruptRecordError, match=r"faces.bin, image 13 of 20 \(pair 6\)"):
        evaluate(grid_embed, VerificationSet(Path("faces.bin"), images, ISSAME), batch_size=4)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.where(images[:, :1, 0, 0] % 2 == 0, np.nan, grid_embed(images))

    with pytest.raises(ConfigError, match=r"faces.bin: .* not finite, the first is image \d+"):
        evaluate(embed, PAIRS)


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("name", ["arcface", "imagenet", "raw"])
def test_module_embed_applies_the_preset(name: str, bgr: bool) -> None:
    preprocess = preprocess_preset(name, bgr=bgr)
    images = np.stack([PAIRS.image(number) for number in range(3)])
    got = module_embed(nn.Flatten(), preprocess, torch.device("cpu"))(images)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, preprocess.apply(images).reshape(3, -1))  # to the bit


def test_module_embed_computes_in_the_given_precision() -> None:
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


def results_of(sizes: dict[str, int]) -> list[VerificationResult]:
    """Perfect results of sets of these numbers of pairs."""
    results = []
    for name, pairs in sizes.items():
        issame = np.arange(pairs) % 2 == 0
        results.append(score(np.where(issame, 0.3, 1.7), issame, name=name))
    return results


def printed(results: list[VerificationResult], width: int) -> str:
    shown = io.StringIO()
    for table in result_tables(results, width):
        Console(file=shown, width=width).print(table)
    return shown.getvalue()


def cells(table: str) -> list[list[str]]:
    lines = (re.split("[│┃]", line)[1:-1] for line in table.splitlines())
    return [[cell.strip() for cell in line] for line in lines if line]


def test_a_table_shows_the_rates_that_a_set_is_large_enough_for() -> None:
    # Not even one impostor pair of the large set is a rate of one in a thousand.
    assert cells(printed(results_of({"[red]small": 40, "la\x1brge": 400}), 80)) == [
        ["set", "[red]small", "la\ufffdrge"],
        ["pairs", "40", "400"],
        ["accuracy", "100.00%", "100.00%"],
        ["± over folds", "0.00%", "0.00%"],
        ["AUC", "1.0000", "1.0000"],
        ["EER", "0.00%", "0.00%"],
        ["TAR at 1e-01", "100.00%", "100.00%"],
        ["TAR at 1e-02", "-", "100.00%"],
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_no_word_of_a_table_is_cut_or_wrapped(width: int) -> None:
    names = ["lfw_fold9", "cfp_fp", "a_verification_set_with_a_long_name", *"abcdefghijk"]
    shown = printed(results_of(dict.fromkeys(names, 40)), width)
    rows = cells(shown)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert [cell for row in rows if row[0] == "set" for cell in row[1:]] == names
    assert {row[0] for row in rows} >= {"set", "± over folds", "TAR at 1e-01"}
    assert {cell for row in rows if row[0] == "accuracy" for cell in row[1:]} == {"100.00%"}


def test_plot_is_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    issame = np.arange(200) % 2 == 0
    results: list[VerificationResult] = [
        score(rng.normal(np.where(issame, 1, mean), 0.4).clip(0, 4), issame, name=f"set {mean}")
        for mean in (1.5, 2.5)
    ]
    for name in ("roc.png", "roc"):
        plot_roc(results, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_plot_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[plot\]'"):
        plot_roc([], tmp_path / "roc.png")


@needs_shared_data
def test_shared_teacher_is_right_on_real_pairs() -> None:
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

    pairs = load_verification_set(SHARED_DATA / "lfw/lfw_fold9.bin")
    genuine, impostors = np.flatnonzero(pairs.issame), np.flatnonzero(~pairs.issame)
    chosen = np.sort(np.concatenate([genuine[::15], impostors[::3]]))
    images = tuple(pairs.images[2 * pair + side] for pair in chosen for side in (0, 1))
    result = evaluate(embed, VerificationSet(pairs.path, images, pairs.issame[chosen]))
    assert (result.genuine_pairs, result.impostor_pairs) == (20, 100)
    assert result.accuracy > 0.95
    assert result.tar_at_far[1e-2] == 1.0
    assert result.tar_at_far[1e-3] is None
    assert result.auc == 1.0


def test_folds_of_one_kind_are_counted_and_reported() -> None:
    distances = np.linspace(0.1, 3.9, 40)
    alternating = np.arange(40) % 2 == 0
    fair = score(distances, alternating, name="fair")
    assert (fair.one_sided_folds, fair.warning) == (0, "")
    ordered = score(distances, distances < 2, name="sorted")
    assert ordered.one_sided_folds == 10
    assert "10 of 10 folds" in ordered.warning
