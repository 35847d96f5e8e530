"""Parameters of a synthetic face: those of the person, and those of one image."""

from functools import partial

import numpy as np

Color = tuple[float, float, float]

SKINS: tuple[Color, ...] = (
    (255, 224, 196),
    (241, 194, 155),
    (224, 172, 125),
    (198, 134, 88),
    (141, 88, 54),
    (92, 58, 40),
)
HAIRS: tuple[Color, ...] = (
    (28, 22, 22),
    (62, 40, 28),
    (110, 68, 36),
    (164, 72, 30),
    (214, 172, 98),
    (150, 148, 148),
    (228, 226, 222),
)
IRISES: tuple[Color, ...] = (
    (62, 38, 22),
    (110, 74, 34),
    (78, 110, 62),
    (70, 118, 168),
    (112, 128, 138),
)


class Identity:
    """Parameters of a person; lengths in units of half the image side."""

    def __init__(self, rng: np.random.Generator) -> None:
        near = partial(_near, rng)

        def maybe(chance: float, low: float, high: float) -> float:
            value = float(rng.uniform(low, high))
            return value if rng.random() < chance else 0.0

        self.skin = _between(SKINS, rng)
        self.hair = _between(HAIRS, rng)
        self.iris = mix(IRISES[rng.integers(len(IRISES))], IRISES[rng.integers(len(IRISES))], 0.3)
        self.lips = mix(shade(self.skin, 0.82), (186, 62, 70), float(rng.uniform(0.15, 0.75)))
        self.head_width = near(0.74, 0.04)
        self.head_top = near(0.92, 0.04)
        self.cheek = near(0.97, 0.04)
        self.jaw = near(0.78, 0.06)
        self.chin = near(0.99, 0.045)
        self.chin_width = near(0.24, 0.05)
        self.ear = near(0.19, 0.03)
        self.hair_volume = near(0.12, 0.045) if rng.random() < 0.9 else 0.0
        self.hair_length = float(rng.choice([0.0, 0.0, 0.35, 0.75, 1.1])) + near(0.0, 0.06)
        self.hair_curl = maybe(0.45, 0.015, 0.05)
        self.hairline = near(-0.56, 0.06)
        self.fringe = maybe(0.4, 0.1, 0.26)
        self.part = float(rng.uniform(-0.6, 0.6))
        self.eye_x = near(0.315, 0.022)
        self.eye_width = near(0.15, 0.015)
        self.eye_height = near(0.078, 0.014)
        self.eye_slant = near(0.0, 0.12)
        self.iris_size = near(0.07, 0.006)
        self.brow_height = near(0.2, 0.025)
        self.brow_thickness = near(0.042, 0.013)
        self.brow_length = near(0.2, 0.02)
        self.brow_slant = near(0.0, 0.12)
        self.brow_arch = near(0.04, 0.025)
        self.nose_length = near(0.33, 0.04)
        self.nose_width = near(0.135, 0.025)
        self.nose_bridge = near(0.05, 0.015)
        self.mouth_y = near(0.645, 0.03)
        self.mouth_width = near(0.26, 0.03)
        self.upper_lip = near(0.05, 0.014)
        self.lower_lip = near(0.065, 0.016)
        self.moustache = maybe(0.2, 0.05, 0.1)
        self.beard = maybe(0.2, 0.5, 1.0)
        self.freckles = int(maybe(0.2, 14, 40))
        self.mole = (near(0.0, 0.3), near(0.4, 0.2)) if rng.random() < 0.25 else None
        self.glasses = maybe(0.2, 0.19, 0.25)
        self.glasses_color = shade((150, 110, 80), float(rng.uniform(0.1, 1.3)))


class Conditions:
    """Parameters that vary between images of one person."""

    def __init__(self, rng: np.random.Generator) -> None:
        near = partial(_near, rng)

        occlusions = ("none", "hat", "sunglasses", "scarf", "blob")
        self.yaw = near(0.0, 0.22)
        self.pitch = near(0.0, 0.13)
        self.roll = near(0.0, 0.07)
        self.zoom = near(0.97, 0.04)
        self.shift = (near(0.0, 0.03), near(0.0, 0.03))
        self.smile = float(rng.uniform(-0.5, 1.0))
        self.mouth_open = float(rng.choice([0.0, 0.0, rng.uniform(0.3, 1.0)]))
        self.eye_open = float(rng.uniform(0.55, 1.1))
        self.brow_raise = near(0.0, 0.025)
        self.gaze = near(0.0, 0.02)
        self.backdrop = _random_color(rng)
        self.clothes = _random_color(rng)
        self.light = (near(0.0, 0.25), near(-0.08, 0.15))
        self.cast = (near(1.0, 0.11), near(1.0, 0.06), near(1.0, 0.11))
        self.gray = 1.0 if rng.random() < 0.15 else float(rng.uniform(0.0, 0.5))
        self.contrast = near(0.9, 0.12)
        self.brightness = near(-4.0, 16.0)
        self.noise = float(rng.uniform(1.0, 9.0))
        self.blur = float(rng.choice([0.0, rng.uniform(0.3, 1.2)]))
        self.occlusion = str(rng.choice(occlusions, p=(0.66, 0.1, 0.08, 0.08, 0.08)))
        self.occlusion_color = _random_color(rng)
        self.occlusion_at = (float(rng.uniform(-0.8, 0.8)), float(rng.uniform(-0.6, 0.9)))
        self.without_glasses = bool(rng.random() < 0.2)


def shade(color: Color, factor: float) -> Color:
    """Darker below 1, lighter above."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def mix(first: Color, second: Color, share: float) -> Color:
    """``share`` of the second colour, the rest of the first."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _near(rng: np.random.Generator, middle: float, spread: float) -> float:
    return middle + spread * float(np.clip(rng.normal(), -2, 2))


def _between(colors: tuple[Color, ...], rng: np.random.Generator) -> Color:
    """A random colour, interpolated in a palette."""
    position = float(rng.uniform(0, len(colors) - 1.001))
    return mix(colors[int(position)], colors[int(position) + 1], position % 1)


def _random_color(rng: np.random.Generator) -> Color:
    red, green, blue = rng.uniform(50, 235, 3).tolist()
    return red, green, blue
