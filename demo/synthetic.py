"""Synthetic faces as image folders, for the demo and for tests, reproducible from a seed."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from gkd.demo.faces import draw_face
from gkd.demo.people import Conditions, Identity
from gkd.storage.util.progress import progress

JPEG_QUALITIES = (60, 96)


def synthetic_image(seed: int, identity: int, image: int) -> npt.NDArray[np.uint8]:
    """Image ``image`` of person ``identity``, RGB uint8 [112, 112, 3], from a seed."""
    # numpy ignores trailing zeros in seeds: [s, i] and [s, i, 0] give the same numbers.
    conditions_rng = np.random.default_rng([seed, identity, image + 1])
    person = Identity(np.random.default_rng([seed, identity]))
    return draw_face(person, Conditions(conditions_rng), conditions_rng)


def draw_faces(
    folder: Path, *, identities: range, images_each: int, seed: int, workers: int
) -> None:
    """Draw ``folder``/IDENTITY/IMAGE.jpg, 112x112, in ``workers`` processes.

    Each file depends on the seed and its own numbers only.
    """
    draw = partial(_draw_identity, folder, images_each, seed)
    with (
        progress("Drawing faces", len(identities) * images_each, "images") as advance,
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
    ):
        for _ in pool.map(draw, identities):
            advance(images_each)


def draw_pairs(
    folder: Path, *, identities: range, images_each: int, pairs: int, seed: int
) -> tuple[list[Path], npt.NDArray[np.bool_]]:
    """Choose pairs of the drawn files, half of them genuine: 2P paths, bool [P] ``issame``."""
    rng = np.random.default_rng([seed, pairs])
    issame = np.arange(pairs) % 2 == 0
    paths = []
    for same in issame:
        people = rng.choice(identities, 2, replace=False)
        if same:
            people[1] = people[0]
        # Different images, also for two different people.
        images = rng.choice(images_each, 2, replace=False)
        paths += [_path(folder, *numbers) for numbers in zip(people, images, strict=True)]
    return paths, issame


def _path(folder: Path, identity: int, image: int) -> Path:
    return folder / f"{identity:05d}" / f"{image:03d}.jpg"


def _draw_identity(folder: Path, images_each: int, seed: int, identity: int) -> None:
    _path(folder, identity, 0).parent.mkdir(parents=True, exist_ok=True)
    qualities = np.random.default_rng([seed, identity]).integers(*JPEG_QUALITIES, images_each)
    for image, quality in enumerate(qualities):
        pixels = synthetic_image(seed, identity, image)
        encoded = simplejpeg.encode_jpeg(pixels, int(quality), "RGB", "420")
        _path(folder, identity, image).write_bytes(encoded)
