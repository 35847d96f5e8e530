"""Class centres in the place of those that a sample does not know."""

import numpy as np
import numpy.typing as npt

BLOCK = 2**16
# Share of a stand-in's variance that it has from one known centre; the rest is of a normal cloud
# with the covariance of all. So look-alikes stay, and no centre comes twice.
KNOWN_SHARE = 0.5


def synthetic_centers(
    known: npt.NDArray[np.float32], count: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """``count`` unit centres [count, D] spread as the known ones [m, D] are.

    Each is mean + sqrt(s) (a known one - mean) + sqrt(1 - s) normal(0, covariance), which has the
    known ones' mean and covariance for any s; made unit length. Every known one serves equally
    often, as far as that is possible.
    """
    mean = known.mean(0, dtype=np.float64)
    away = known - mean
    values, vectors = np.linalg.eigh(away.T @ away / len(known))
    root = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
    away = (np.sqrt(KNOWN_SHARE) * away).astype(np.float32)
    order = np.resize(rng.permutation(len(known)), count)
    made = np.empty((count, known.shape[1]), np.float32)
    for start in range(0, count, BLOCK):
        some = order[start : start + BLOCK]
        clouds = rng.standard_normal((len(some), len(root)), np.float32) @ root
        block = mean.astype(np.float32) + away[some] + np.float32(np.sqrt(1 - KNOWN_SHARE)) * clouds
        made[start : start + len(some)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made
