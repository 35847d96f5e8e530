"""A folder in the layout of IJB-C, whose crops hold given aligned faces at known positions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

# Eyes, nose and corners of the mouth in aligned faces.
PUBLISHED_POINTS = np.array(
    [
        [30.2946 + 8, 51.6963],
        [65.5318 + 8, 51.5014],
        [48.0252 + 8, 71.7366],
        [33.5493 + 8, 92.3655],
        [62.7299 + 8, 92.2041],
    ]
)
SIDE = 260


def place_face(
    face: npt.NDArray[np.uint8], *, degrees: float, scale: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """A crop [SIDE, SIDE, 3] with the face rotated and scaled about its centre, and its points."""
    angle = np.deg2rad(degrees)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre, target = np.array([55.5, 55.5]), np.array([SIDE / 2, SIDE / 2 - 10])
    y, x = np.mgrid[:SIDE, :SIDE]
    source = np.asarray((np.stack([x, y], -1) - target) @ np.linalg.inv(rotation).T + centre, float)
    return sampled(face, source), (PUBLISHED_POINTS - centre) @ rotation.T + target


def sampled(
    image: npt.NDArray[np.uint8], positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """Bilinear samples of an image at positions [..., 2] (x, y), black outside."""
    height, width, _ = image.shape
    corner = np.floor(positions).astype(int)
    total = np.zeros((*positions.shape[:-1], 3))
    for right in (0, 1):
        for down in (0, 1):
            x, y = corner[..., 0] + right, corner[..., 1] + down
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            weight = (1 - np.abs(positions[..., 0] - x)) * (1 - np.abs(positions[..., 1] - y))
            pixels = image[y.clip(0, height - 1), x.clip(0, width - 1)]
            total += np.where(inside, weight, 0)[..., None] * pixels
    return np.rint(total).clip(0, 255).astype(np.uint8)


def write_ijb(
    folder: Path,
    faces: Sequence[Path],
    *,
    templates: Sequence[int],
    media: Sequence[int],
    scores: Sequence[float],
    pairs: Sequence[tuple[int, int, int]],
    name: str = "ijbc",
) -> None:
    """Write the aligned faces, each rotated and scaled differently, and the three lists."""
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    points, listed = [], []
    for number, face in enumerate(faces, 1):
        aligned = np.asarray(Image.open(face).convert("RGB"))
        crop, landmarks = place_face(
            aligned, degrees=37 * number % 90 - 45, scale=1 + number % 3 / 4
        )
        encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(crop), quality=95)
        (folder / "loose_crop" / f"{number}.jpg").write_bytes(encoded)
        words = " ".join(f"{value:.4f}" for value in landmarks.ravel())
        points.append(f"{number}.jpg {words} {scores[number - 1]}")
        listed.append(f"{number}.jpg {templates[number - 1]} {media[number - 1]}")
    meta = {
        "face_tid_mid": listed,
        "name_5pts_score": points,
        "template_pair_label": [" ".join(map(str, pair)) for pair in pairs],
    }
    for suffix, lines in meta.items():
        (folder / "meta" / f"{name}_{suffix}.txt").write_text("\n".join(lines) + "\n")
