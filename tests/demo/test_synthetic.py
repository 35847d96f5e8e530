"""Synthetic faces: the same from the same seed, and a person recognisable under conditions."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from gkd.demo.synthetic import draw_faces, draw_pairs, synthetic_image


def test_an_image_depends_on_its_numbers_alone() -> None:
    image = synthetic_image(3, 5, 2)
    assert image.shape == (112, 112, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, synthetic_image(3, 5, 2))
    for other in [(4, 5, 2), (3, 6, 2), (3, 5, 3)]:
        assert np.abs(image.astype(int) - synthetic_image(*other)).mean() > 5


def test_a_person_stays_recognisable() -> None:
    """Pixels normalised for light and contrast find the person more often than chance does."""
    people, images = 20, 12
    pixels = np.array(
        [[synthetic_image(1, i, j) for j in range(images)] for i in range(people)], np.float64
    )
    cells = pixels.reshape(people, images, 14, 8, 14, 8, 3).mean(axis=(3, 5))
    features = cells.reshape(people, images, -1)
    features = features - features.mean(axis=-1, keepdims=True)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    centers = features[:, :6].mean(axis=1)
    nearest = np.einsum("ijd,kd->ijk", features[:, 6:], centers).argmax(axis=-1)
    found = (nearest == np.arange(people)[:, None]).mean()
    # One in twenty is chance; all of them would leave nothing to learn.
    assert 0.15 < found < 0.9


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def test_folders_are_the_same_for_any_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_faces(tmp_path / "one", identities=range(2, 6), images_each=3, seed=0, workers=1)
    draw_faces(tmp_path / "two", identities=range(2, 4), images_each=3, seed=0, workers=2)
    files = read(tmp_path / "one")
    assert list(files) == [f"{i:05d}/{j:03d}.jpg" for i in range(2, 6) for j in range(3)]
    assert list(files.items())[:6] == list(read(tmp_path / "two").items())
    decoded = simplejpeg.decode_jpeg(files["00003/001.jpg"]).astype(int)
    assert np.abs(decoded - synthetic_image(0, 3, 1)).mean() < 10
    assert "Drawing faces: 12/12" in capsys.readouterr().err


def test_pairs_are_of_both_kinds_and_never_of_one_image() -> None:
    people = range(100, 120)
    paths, issame = draw_pairs(Path("f"), identities=people, images_each=4, pairs=60, seed=0)
    assert (len(paths), issame.sum()) == (120, 30)
    names = {str(Path("f") / f"{i:05d}" / f"{j:03d}.jpg") for i in people for j in range(4)}
    for first, second, same in zip(paths[::2], paths[1::2], issame, strict=True):
        assert (first.parent == second.parent) == same
        assert first != second
        assert {str(first), str(second)} <= names
    again, _ = draw_pairs(Path("f"), identities=people, images_each=4, pairs=60, seed=0)
    assert again == paths
