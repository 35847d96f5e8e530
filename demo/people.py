"""Parameters of a synthetic face: those of the person, and those of one image."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Identity:
    """Parameters of a person; lengths in units of half the image side."""

    skin: Color
    hair: Color
    iris: Color
    lips: Color
    head_width: float
    head_top: float
    cheek: float
    jaw: float
    chin: float
    chin_width: float
    ear: float
    hair_volume: float
    hair_length: float
    hair_curl: float
    hairline: float
    fringe: float
    part: float
    eye_x: float
    eye_width: float
    eye_height: float
    eye_slant: float
    iris_size: float
    brow_height: float
    brow_thickness: float
    brow_length: float
    brow_slant: float
    brow_arch: float
    nose_length: float
    nose_width: float
    nose_bridge: float
    mouth_y: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    moustache: float
    beard: float
    freckles: int
    mole: tuple[float, float] | None
    glasses: float
    glasses_color: Color

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Identity":
        """Draw a person."""

        near = partial(_near, rng)

        def maybe(chance: float, low: float, high: float) -> float:
            value = float(rng.uniform(low, high))
            return value if rng.random() < chance else 0.0

        skin = _between(SKINS, rng)
        hair = _between(HAIRS, rng)
        return cls(
            skin=skin,
            hair=hair,
            iris=mix(IRISES[rng.integers(len(IRISES))], IRISES[rng.integers(len(IRISES))], 0.3),
            lips=mix(shade(skin, 0.82), (186, 62, 70), float(rng.uniform(0.15, 0.75))),
            head_width=near(0.74, 0.04),
            head_top=near(0.92, 0.04),
            cheek=near(0.97, 0.04),
            jaw=near(0.78, 0.06),
            chin=near(0.99, 0.045),
            chin_width=near(0.24, 0.05),
            ear=near(0.19, 0.03),
            hair_volume=near(0.12, 0.045) if rng.random() < 0.9 else 0.0,
            hair_length=float(rng.choice([0.0, 0.0, 0.35, 0.75, 1.1])) + near(0.0, 0.06),
            hair_curl=maybe(0.45, 0.015, 0.05),
            hairline=near(-0.56, 0.06),
            fringe=maybe(0.4, 0.1, 0.26),
            part=float(rng.uniform(-0.6, 0.6)),
            eye_x=near(0.315, 0.022),
            eye_width=near(0.15, 0.015),
            eye_height=near(0.078, 0.014),
            eye_slant=near(0.0, 0.12),
            iris_size=near(0.07, 0.006),
            brow_height=near(0.2, 0.025),
            brow_thickness=near(0.042, 0.013),
            brow_length=near(0.2, 0.02),
            brow_slant=near(0.0, 0.12),
            brow_arch=near(0.04, 0.025),
            nose_length=near(0.33, 0.04),
            nose_width=near(0.135, 0.025),
            nose_bridge=near(0.05, 0.015),
            mouth_y=near(0.645, 0.03),
            mouth_width=near(0.26, 0.03),
            upper_lip=near(0.05, 0.014),
            lower_lip=near(0.065, 0.016),
            moustache=maybe(0.2, 0.05, 0.1),
            beard=maybe(0.2, 0.5, 1.0),
            freckles=int(maybe(0.2, 14, 40)),
            mole=(near(0.0, 0.3), near(0.4, 0.2)) if rng.random() < 0.25 else None,
            glasses=maybe(0.2, 0.19, 0.25),
            glasses_color=shade((150, 110, 80), float(rng.uniform(0.1, 1.3))),
        )


@dataclass(frozen=True)
class Conditions:
    """Parameters that vary between images of one person."""

    yaw: float
    pitch: float
    roll: float
    zoom: float
    shift: tuple[float, float]
    smile: float
    mouth_open: float
    eye_open: float
    brow_raise: float
    gaze: float
    backdrop: Color
    clothes: Color
    light: tuple[float, float]
    cast: Color
    gray: float
    contrast: float
    brightness: float
    noise: float
    blur: float
    occlusion: str
    occlusion_color: Color
    occlusion_at: tuple[float, float]
    without_glasses: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Conditions":
        """Draw the conditions of an image."""

        near = partial(_near, rng)

        occlusions = ("none", "hat", "sunglasses", "scarf", "blob")
        return cls(
            yaw=near(0.0, 0.22),
            pitch=near(0.0, 0.13),
            roll=near(0.0, 0.07),
            zoom=near(0.97, 0.04),
            shift=(near(0.0, 0.03), near(0.0, 0.03)),
            smile=float(rng.uniform(-0.5, 1.0)),
            mouth_open=float(rng.choice([0.0, 0.0, rng.uniform(0.3, 1.0)])),
            eye_open=float(rng.uniform(0.55, 1.1)),
            brow_raise=near(0.0, 0.025),
            gaze=near(0.0, 0.02),
            backdrop=_random_color(rng),
            clothes=_random_color(rng),
            light=(near(0.0, 0.25), near(-0.08, 0.15)),
            cast=(near(1.0, 0.11), near(1.0, 0.06), near(1.0, 0.11)),
            gray=1.0 if rng.random() < 0.15 else float(rng.uniform(0.0, 0.5)),
            contrast=near(0.9, 0.12),
            brightness=near(-4.0, 16.0),
            noise=float(rng.uniform(1.0, 9.0)),
            blur=float(rng.choice([0.0, rng.uniform(0.3, 1.2)])),
            occlusion=str(rng.choice(occlusions, p=(0.66, 0.1, 0.08, 0.08, 0.08))),
            occlusion_color=_random_color(rng),
            occlusion_at=(float(rng.uniform(-0.8, 0.8)), float(rng.uniform(-0.6, 0.9))),
            without_glasses=bool(rng.random() < 0.2),
        )


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
