"""IJB 1:1: templates by hand and by naive loops, TAR at FAR by hand, and damaged files."""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gkd.demo.synthetic import draw_faces
from gkd.pipeline.teacher.onnx_embedder import OnnxEmbedder
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.trainer.evaluation.bin_file import load_verification_set
from gkd.trainer.evaluation.embed import evaluate
from gkd.trainer.evaluation.ijb import (
    IjbSet,
    is_ijb,
    load_ijb,
    pair_cosines,
    template_vectors,
)
from gkd.trainer.evaluation.protocols import load_set
from gkd.trainer.evaluation.roc import corners
from tests.paths import SHARED_DATA, needs_shared_data
from tests.trainer.evaluation.ijb_folder import write_ijb
from tests.trainer.evaluation.networks import grid_embed

TEMPLATES, MEDIA = (30, 10, 10, 10, 20, 30), (5, 1, 1, 2, 1, 5)
SCORES = (1.0, 1.0, 0.5, 0.5, 0.2, 1.0)
PAIRS = ((10, 20, 1), (20, 30, 0), (30, 10, 0))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drawn")
    draw_faces(folder, identities=range(3), images_each=2, seed=4, workers=1)
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture
def folder(faces: list[Path], tmp_path: Path) -> Path:
    lists = {"templates": TEMPLATES, "media": MEDIA, "scores": SCORES, "pairs": PAIRS}
    write_ijb(tmp_path / "IJBC", faces, **lists)  # type: ignore[arg-type]
    return tmp_path / "IJBC"


def test_templates_by_hand() -> None:
    sums = np.array([[-2, 0], [3, 0], [1, 2], [0, 4], [0, 5], [-4, 0]], np.float32)
    positions = np.array([2, 0, 0, 0, 1, 2])
    got = template_vectors(sums, np.array(SCORES), positions, np.array(MEDIA))
    # Template 10: its medium 1 is ((3, 0) + (0.5, 1)) / 2, its medium 2 (0, 2): (1.75, 2.5).
    # Template 20: (0, 1); its medium 1 is not that of template 10. Template 30: (-3, 0).
    length = np.sqrt(1.75**2 + 2.5**2)
    expected = [[1.75 / length, 2.5 / length], [0, 1], [-1, 0]]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    cosines = pair_cosines(got, np.array([[0, 1], [1, 2], [2, 0]]))
    np.testing.assert_allclose(cosines, [2.5 / length, 0, -1.75 / length], atol=1e-12)


def naive_templates(
    sums: npt.NDArray[np.float32], scores: list[float], templates: list[int], media: list[int]
) -> list[npt.NDArray[np.float64]]:
    """The protocol in loops."""
    result = []
    for template in sorted(set(templates)):
        rows = [row for row, other in enumerate(templates) if other == template]
        total = np.zeros(sums.shape[1])
        for medium in {media[row] for row in rows}:
            frames = [
                sums[row].astype(np.float64) * scores[row] for row in rows if media[row] == medium
            ]
            total += np.mean(frames, axis=0)
        norm = np.linalg.norm(total)
        result.append(total / norm if norm else total)
    return result


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_templates_agree_with_the_naive_reading(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    _, templates = np.unique(rng.integers(0, 6, count), return_inverse=True)
    media, scores = rng.integers(0, 4, count), rng.uniform(0, 1, count)
    sums = rng.normal(0, 10, (count, 5)).astype(np.float32)
    got = template_vectors(sums, scores, templates, media)
    expected = naive_templates(sums, scores.tolist(), templates.tolist(), media.tolist())
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_cosines_of_many_pairs_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd.trainer.evaluation.ijb.CHUNK", 7)
    rng = np.random.default_rng(0)
    vectors, pairs = rng.normal(size=(9, 4)), rng.integers(0, 9, (50, 2))
    expected = [float(vectors[a] @ vectors[b]) for a, b in pairs.tolist()]
    np.testing.assert_allclose(pair_cosines(vectors, pairs), expected, rtol=1e-12)


def scored_set(issame: list[bool]) -> IjbSet:
    none = np.zeros(1)
    return IjbSet(
        *(Path("IJBC"), ("1.jpg",), "ijbc", none, none, np.zeros(1, np.int64)),
        *(np.zeros(1, np.int64), np.zeros((len(issame), 2), np.int64), np.array(issame)),
    )


def test_rates_by_hand() -> None:
    genuine = [0.9, 0.8, 0.45, 0.1]
    impostors = [0.5, 0.4, *[0.0] * 18]
    issame = [True] * 4 + [False] * 20
    result = scored_set(issame).score_pairs(np.array(genuine + impostors))
    # A tenth of 20 impostors is two: everything from 0.1 up is accepted, with two impostors.
    assert result.tar_at_far == {1e-1: 1.0, **dict.fromkeys((1e-2, 1e-3, 1e-4, 1e-5, 1e-6))}
    # Of 80 combinations, 0.45 loses to 0.5, and 0.1 to 0.5 and 0.4.
    assert result.auc == pytest.approx(77 / 80)
    assert (result.genuine_pairs, result.impostor_pairs) == (4, 20)
    hundred = scored_set([True] * 4 + [False] * 100).score_pairs(
        np.array([0.9, 0.8, 0.45, 0.1, 0.5, 0.4, *[0.0] * 98])
    )
    # One of a hundred impostors may pass: 0.45 comes with the one at 0.5.
    assert hundred.tar_at_far[1e-2] == 0.75
    assert hundred.tar_at_far[1e-3] is None
    assert hundred.to_builtins()["tar_at_far"]["1e-02"] == 0.75


def test_corners_determine_the_full_curve() -> None:
    rng = np.random.default_rng(1)
    steps = rng.integers(0, 2, 200)
    far = np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
    tar = np.concatenate([[0], np.cumsum(1 - steps)]) / (1 - steps).sum()
    kept = corners(far, tar)
    assert 2 < kept.sum() < len(far)
    assert np.trapezoid(tar[kept], far[kept]) == pytest.approx(np.trapezoid(tar, far))
    np.testing.assert_allclose(
        [tar[kept][np.searchsorted(far[kept], x + 1e-12, "right") - 1] for x in far],
        [tar[np.searchsorted(far, x + 1e-12, "right") - 1] for x in far],
    )


def test_a_folder_is_read_and_its_faces_aligned(folder: Path, faces: list[Path]) -> None:
    loaded = load_ijb(folder)
    assert is_ijb(folder)
    assert (loaded.name, loaded.num_templates) == ("ijbc", 3)
    assert loaded.templates.tolist() == [2, 0, 0, 0, 1, 2]
    assert loaded.pairs.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert loaded.issame.tolist() == [True, False, False]
    assert loaded.scores.tolist() == list(SCORES)
    for number, path in enumerate(faces):
        face = np.asarray(Image.open(path).convert("RGB")).astype(int)
        aligned = loaded.face(number)
        inner = np.s_[6:-6, 6:-6]
        assert np.abs(aligned[inner] - face[inner]).mean() < 5


@pytest.mark.parametrize("batch_size", [4, 64])
def test_from_images_to_cosines(folder: Path, batch_size: int) -> None:
    loaded = load_ijb(folder)
    result = evaluate(grid_embed, loaded, batch_size=batch_size)
    sums = []
    for number in range(6):
        image = loaded.face(number)
        sums.append(grid_embed(image[None])[0] + grid_embed(image[None, :, ::-1])[0])
    ten, twenty, thirty = naive_templates(np.array(sums), list(SCORES), [*TEMPLATES], [*MEDIA])
    genuine, impostors = ten @ twenty, [twenty @ thirty, thirty @ ten]
    assert result.auc == pytest.approx(np.mean([genuine > impostor for impostor in impostors]))
    assert (result.images, result.templates, result.name) == (6, 3, "ijbc")


def change(path: Path, line: int, content: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = content
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "line", "content", "message"),
    [
        ("face_tid_mid", 2, "2.jpg 10", "expected NAME TEMPLATE MEDIUM, got '2.jpg 10'"),
        ("face_tid_mid", 3, "3.jpg x 1", "expected NAME TEMPLATE MEDIUM, got '3.jpg x 1'"),
        ("face_tid_mid", 1, "../../x 1 1", "expected the name of an image below loose_crop/, got"),
        ("face_tid_mid", 2, "/etc/x 1 1", "expected the name of an image below loose_crop/, got"),
        ("name_5pts_score", 4, "4.jpg 1 2 3", "expected NAME X1 Y1 ... X5 Y5 SCORE, got '4.jpg 1"),
        ("name_5pts_score", 1, "1.jpg" + " nan" * 11, "expected NAME X1 Y1 ... X5 Y5 SCORE, got"),
        (
            "name_5pts_score",
            5,
            "6.jpg" + " 1" * 11,
            "expected 5.jpg, as in ijbc_face_tid_mid.txt, got '6",
        ),
        ("template_pair_label", 2, "20 30", "expected TEMPLATE TEMPLATE LABEL, got '20 30'"),
        ("template_pair_label", 3, "20 x 1", "expected TEMPLATE TEMPLATE LABEL, got '20 x 1'"),
        ("template_pair_label", 1, "10 11 1", "expected two templates that have faces, and 1 or 0"),
        ("template_pair_label", 3, "10 20 2", "expected two templates that have faces, and 1 or 0"),
    ],
)
def test_a_damaged_line_is_named(
    folder: Path, file: str, line: int, content: str, message: str
) -> None:
    change(folder / "meta" / f"ijbc_{file}.txt", line, content)
    with pytest.raises(CorruptRecordError) as error:
        load_ijb(folder)
    assert f"ijbc_{file}.txt, line {line}: {message}" in str(error.value)


def test_lists_that_do_not_fit_each_other_are_named(folder: Path) -> None:
    points = folder / "meta/ijbc_name_5pts_score.txt"
    full = points.read_text()
    points.write_text("".join(full.splitlines(keepends=True)[:-1]))
    with pytest.raises(CorruptRecordError, match=r"5pts_score.txt: expected 6 faces.*got 5"):
        load_ijb(folder)
    points.write_text(full + full.splitlines(keepends=True)[0])
    with pytest.raises(CorruptRecordError, match=r"expected 6 faces.*got 7"):
        load_ijb(folder)
    points.unlink()
    with pytest.raises(ConfigError, match=r"5pts_score.txt: expected this file beside"):
        load_ijb(folder)


@pytest.mark.parametrize("content", ["", "10 20 1\n"])
def test_too_few_pairs_are_refused(folder: Path, content: str) -> None:
    (folder / "meta/ijbc_template_pair_label.txt").write_text(content)
    with pytest.raises(CorruptRecordError, match=r"pair_label.txt: expected (a line|pairs of one)"):
        load_ijb(folder)


def test_unreadable_images_are_named(folder: Path) -> None:
    (folder / "loose_crop/3.jpg").write_bytes(b"junk")
    loaded = load_ijb(folder)
    with pytest.raises(CorruptRecordError, match=r"loose_crop/3.jpg: expected an encoded image"):
        evaluate(grid_embed, loaded)
    (folder / "loose_crop/3.jpg").unlink()
    message = r"loose_crop/3.jpg: expected the image of face 3 of ijbc, got No such file"
    with pytest.raises(CorruptRecordError, match=message):
        evaluate(grid_embed, loaded)


def test_unusable_points_are_named(folder: Path) -> None:
    change(folder / "meta/ijbc_name_5pts_score.txt", 2, "2.jpg" + " 7" * 10 + " 1")
    with pytest.raises(
        CorruptRecordError, match=r"score.txt, face 2 \(loose_crop/2.jpg\): expected five"
    ):
        evaluate(grid_embed, load_ijb(folder))


def test_embeddings_that_are_not_finite_are_named(folder: Path) -> None:
    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.full((len(images), 4), np.nan, np.float32)

    with pytest.raises(ConfigError, match=re.escape("6 images are not finite, the first is loose")):
        evaluate(embed, load_ijb(folder))


def test_folders_of_no_protocol_and_of_two_sets_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a folder with meta/\*_template_pair_label"):
        load_set(tmp_path)
    other = folder / "meta/ijbb_template_pair_label.txt"
    other.write_text("1 2 1\n")
    with pytest.raises(ConfigError, match=r"expected one file .*, got ijbb_.*, ijbc_"):
        load_set(folder)


@needs_shared_data
def test_shared_teacher_separates_real_people_in_rotated_crops(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    embed = OnnxEmbedder(
        SHARED_DATA / "teachers/mobilefacenet.onnx", preprocess_preset("imagenet"), device="cpu"
    )
    pairs = load_verification_set(SHARED_DATA / "lfw/lfw_fold9.bin")
    faces = []
    for pair in np.flatnonzero(pairs.issame)[::30].tolist():
        for number in (2 * pair, 2 * pair + 1):
            faces.append(tmp_path / f"{number}.jpg")
            faces[-1].write_bytes(pairs.images[number])
    people = len(faces) // 2
    write_ijb(
        tmp_path / "IJBC",
        faces,
        templates=range(len(faces)),
        media=range(len(faces)),
        scores=[1.0] * len(faces),
        pairs=[(2 * a, 2 * b + 1, int(a == b)) for a in range(people) for b in range(people)],
    )
    result = evaluate(embed, load_ijb(tmp_path / "IJBC"))
    assert (result.genuine_pairs, result.impostor_pairs) == (people, people * (people - 1))
    assert people >= 10
    assert result.auc == 1.0
