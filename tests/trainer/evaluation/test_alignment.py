"""Alignment: known transforms, a linear least-squares solution, and bilinear samples by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.storage.errors import ConfigError
from gkd.trainer.evaluation.alignment import FACE_POINTS, align_face, similarity_transform, warp
from tests.trainer.evaluation.ijb_folder import PUBLISHED_POINTS, place_face, sampled


def test_points_are_the_published_ones() -> None:
    np.testing.assert_allclose(FACE_POINTS, PUBLISHED_POINTS, atol=1e-9)


def test_a_known_transform_is_found() -> None:
    # A quarter turn, twice the size, shifted: (x, y) -> (-2y + 7, 2x - 3).
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [5.0, 1.0]])
    moved = np.column_stack([-2 * points[:, 1] + 7, 2 * points[:, 0] - 3])
    found = similarity_transform(points, moved)
    np.testing.assert_allclose(found, [[0, -2, 7], [2, 0, -3]], atol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_noisy_points_have_the_least_squares_solution(seed: int) -> None:
    """With rotation and scale as (a, -b; b, a) the problem is linear and solved independently."""
    rng = np.random.default_rng(seed)
    points, targets = rng.normal(60, 20, (2, 5, 2))
    x, y, zero, one = points[:, 0], points[:, 1], np.zeros(5), np.ones(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    (a, b, right, down), *_ = np.linalg.lstsq(rows, np.concatenate(targets.T))
    np.testing.assert_allclose(
        similarity_transform(points, targets), [[a, -b, right], [b, a, down]], atol=1e-8
    )


def test_mirrored_points_do_not_give_a_reflection() -> None:
    mirrored = FACE_POINTS * [-1, 1]
    found = similarity_transform(mirrored, FACE_POINTS)
    assert np.linalg.det(found[:, :2]) > 0


@pytest.mark.parametrize("points", [np.full((5, 2), 3.0), np.full((5, 2), np.nan)])
def test_unusable_points_are_refused(points: "np.ndarray[tuple[int, int]]") -> None:
    with pytest.raises(ConfigError, match="expected five different points"):
        similarity_transform(points, FACE_POINTS)


def random_image(height: int, width: int) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_integer_shifts_are_exact() -> None:
    image = random_image(112, 112)
    np.testing.assert_array_equal(warp(image, np.eye(2, 3)), image)
    shifted = warp(image, np.array([[1.0, 0, 10], [0, 1, -4]]))
    np.testing.assert_array_equal(shifted[:-4, 10:], image[4:, :-10])
    assert not shifted[:, :10].any()
    assert not shifted[-4:].any()
    quarter = warp(image, np.array([[0.0, -1, 111], [1, 0, 0]]))
    np.testing.assert_array_equal(quarter, np.rot90(image, -1))


def test_pixels_between_are_bilinear() -> None:
    image = random_image(150, 170)
    transform = np.array([[0.9, -0.4, 30.3], [0.4, 0.9, -25.6]])
    y, x = np.mgrid[:112, :112]
    positions = (np.stack([x, y], -1) - transform[:, 2]) @ np.linalg.inv(transform[:, :2]).T
    inside = (positions > 1).all(axis=2) & (positions < [168, 148]).all(axis=2)
    assert inside.mean() > 0.6
    error = np.abs(warp(image, transform).astype(int) - sampled(image, positions))
    assert error[inside].max() <= 1


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1.0), (30, 1.5), (-75, 1.2), (180, 2.0)])
def test_a_rotated_and_scaled_face_is_restored(degrees: float, scale: float) -> None:
    coarse = random_image(8, 8).repeat(14, 0).repeat(14, 1)
    face = np.asarray(
        np.stack([np.convolve(row, np.ones(9) / 9, "same") for row in coarse.reshape(-1, 336)])
    )
    face = face.reshape(112, 112, 3).astype(np.uint8)
    crop, points = place_face(face, degrees=degrees, scale=scale)
    error = np.abs(align_face(crop, points).astype(int) - face)[4:-4, 4:-4]
    assert error.mean() < 6
    # Less than a shift by one pixel: the alignment is accurate to a fraction of a pixel.
    assert np.abs(np.roll(face, 1, axis=1).astype(int) - face).mean() > error.mean()
