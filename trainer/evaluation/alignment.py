"""Five facial points to an aligned face of 112x112, as face recognition networks expect it."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from gkd.storage.errors import ConfigError
from gkd.storage.records.images import FACE_SHAPE

# Left eye, right eye, nose, left and right corner of the mouth, as seen in the image; x and y in
# pixels, (0, 0) is the centre of the first (recognition/arcface_torch/eval_ijbc.py of insightface).
FACE_POINTS = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity_transform(
    points: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Rotation, scale and shift [2, 3] that maps ``points`` [K, 2] closest to ``targets`` [K, 2].

    Least squares without reflection: Umeyama, Least-Squares Estimation of Transformation
    Parameters Between Two Point Patterns, 1991.

    Raises:
        ConfigError: if the points are not finite, or all equal.
    """
    mean, target_mean = points.mean(axis=0), targets.mean(axis=0)
    centred = points - mean
    variance = np.square(centred).sum() / len(points)
    if not np.isfinite(variance) or variance <= 0:
        raise ConfigError(expected="five different points", got=points.tolist())
    left, singular, right = np.linalg.svd((targets - target_mean).T @ centred / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    linear = (left * signs) @ right * (singular @ signs / variance)
    return np.column_stack([linear, target_mean - linear @ mean])


def align_face(
    image: npt.NDArray[np.uint8], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """The face of an RGB image [H, W, 3] whose five points [5, 2] are given; [112, 112, 3].

    Bilinear, black outside the image.

    Raises:
        ConfigError: if the points are not finite, or all equal.
    """
    return warp(image, similarity_transform(points, FACE_POINTS))


def warp(image: npt.NDArray[np.uint8], transform: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """An RGB image [H, W, 3] under ``transform`` [2, 3] (x, y of the image to x, y of the face)."""
    inverse = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))[:2]
    # Pillow takes the inverse map, and the centre of its pixel (0, 0) is at (1/2, 1/2).
    inverse[:, 2] += 0.5 - inverse[:, :2].sum(axis=1) / 2
    height, width, _ = FACE_SHAPE
    warped = Image.fromarray(image).transform(
        (width, height),
        Image.Transform.AFFINE,
        tuple(inverse.ravel().tolist()),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(warped)
