"""Draws a synthetic face, given the person and the conditions of the image."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from gkd.demo.people import Color, Conditions, Identity, mix, shade

SIZE = 112
SUPERSAMPLING = 3

# Coordinates of a face: x to the right, y down, z out of the face; the aligned image spans
# -1..1 in x and y, with the eyes and the mouth where ArcFace's alignment puts them.
Points = npt.NDArray[np.float64]

WHITE: Color = (246, 244, 240)


def draw_face(
    identity: Identity, conditions: Conditions, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """One image, RGB uint8 [112, 112, 3]; ``rng`` draws the noise."""
    pen = _Pen(conditions)
    _draw_back_hair(pen, identity)
    _draw_shoulders(pen, identity, conditions)
    _draw_head(pen, identity)
    _draw_marks(pen, identity)
    _draw_beard(pen, identity)
    _draw_nose(pen, identity)
    _draw_mouth(pen, identity, conditions)
    _draw_eyes(pen, identity, conditions)
    _draw_front_hair(pen, identity)
    _draw_brows(pen, identity, conditions)
    if identity.glasses and not conditions.without_glasses:
        _draw_glasses(pen, identity)
    _draw_occlusion(pen, identity, conditions)
    return _photograph(pen.image.reduce(SUPERSAMPLING), conditions, rng)


# --- shapes ---------------------------------------------------------------------------------------


class _Pen:
    """Fills shapes given in face coordinates, as seen in the pose of ``conditions``."""

    def __init__(self, conditions: Conditions) -> None:
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), _rgb(conditions.backdrop))
        self.canvas = ImageDraw.Draw(self.image)
        self.yaw = (np.cos(conditions.yaw), np.sin(conditions.yaw))
        self.pitch = (np.cos(conditions.pitch), np.sin(conditions.pitch))
        cosine, sine = np.cos(conditions.roll), np.sin(conditions.roll)
        half = side / 2
        self.rotation = np.array([[cosine, -sine], [sine, cosine]]) * conditions.zoom * half
        self.middle = half * (1 + np.array(conditions.shift))

    def fill(self, points: Points, color: Color, depth: float = 0.0) -> None:
        """Fill a closed shape [n, 2] on a curved surface, ``depth`` high at its centre."""
        x, y = points.T
        z = depth * np.sqrt(np.clip(1 - np.square(x / 1.05), 0, 1))
        rotated = np.stack(
            [
                x * self.yaw[0] + z * self.yaw[1],
                y * self.pitch[0] + z * self.pitch[1],
            ]
        )
        pixels = (self.rotation @ rotated).T + self.middle
        self.canvas.polygon(pixels.ravel().tolist(), fill=_rgb(color))


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Points:
    angles = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    across, down = rx * np.cos(angles), ry * np.sin(angles)
    return np.stack([x + across, y + down + tilt * across], axis=1)


_STEPS = np.linspace(0, 1, 6, endpoint=False)
# Catmull-Rom weights of four neighbouring control points, [steps, 4]
_SPLINE = 0.5 * np.stack(
    [
        -_STEPS + 2 * _STEPS**2 - _STEPS**3,
        2 - 5 * _STEPS**2 + 3 * _STEPS**3,
        _STEPS + 4 * _STEPS**2 - 3 * _STEPS**3,
        _STEPS**3 - _STEPS**2,
    ],
    axis=1,
)


def _smooth(controls: list[tuple[float, float]]) -> Points:
    """Closed smooth curve through control points, [6 n, 2]."""
    points = np.array(controls)
    neighbours = np.stack([np.roll(points, shift, axis=0) for shift in (1, 0, -1, -2)], axis=1)
    return np.asarray(np.einsum("sk,nkd->nsd", _SPLINE, neighbours).reshape(-1, 2))


def _mirrored(right: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The right half's points from top to bottom, closed by their mirror image."""
    return right + [(-x, y) for x, y in reversed(right) if x > 0]


def _sway(points: Points, amount: float, waves: float) -> Points:
    """Curls: modulate the radius of an outline with ``waves`` periods."""
    phase = np.linspace(0, 2 * np.pi * waves, len(points))
    return points * (1 + amount * np.sin(phase))[:, None]


# --- features -------------------------------------------------------------------------------------


def _head(identity: Identity) -> list[tuple[float, float]]:
    width = identity.head_width
    return _mirrored(
        [
            (0.0, -identity.head_top),
            (width * 0.62, -identity.head_top + 0.1),
            (width * 0.97, -0.45),
            (width * identity.cheek, 0.1),
            (width * identity.jaw, 0.62),
            (identity.chin_width, identity.chin - 0.04),
            (0.0, identity.chin),
        ]
    )


def _draw_shoulders(pen: _Pen, identity: Identity, conditions: Conditions) -> None:
    neck = identity.head_width * 0.55
    shadow = shade(identity.skin, 0.8)
    pen.fill(np.array([(-neck, 0.6), (neck, 0.6), (neck, 1.5), (-neck, 1.5)]), shadow, -0.15)
    pen.fill(_ellipse(0, 1.62, 1.25, 0.55), conditions.clothes, -0.1)


def _draw_head(pen: _Pen, identity: Identity) -> None:
    for side in (-1, 1):
        x = side * identity.head_width * identity.cheek
        pen.fill(_ellipse(x, 0.08, 0.09, identity.ear), shade(identity.skin, 0.92), -0.1)
        pen.fill(_ellipse(x, 0.08, 0.05, identity.ear * 0.6), shade(identity.skin, 0.78), -0.1)
    outline = _smooth(_head(identity))
    pen.fill(outline, shade(identity.skin, 0.86))
    pen.fill(outline * (0.94, 0.95), identity.skin, 0.12)
    blush = mix(identity.skin, (224, 96, 84), 0.16)
    for side in (-1, 1):
        pen.fill(_ellipse(side * 0.4, 0.32, 0.16, 0.11), blush, 0.5)


def _draw_marks(pen: _Pen, identity: Identity) -> None:
    dark = shade(identity.skin, 0.68)
    # The golden angle spreads them evenly; no random number of the image is used for the person.
    for number in range(identity.freckles):
        angle, radius = 2.4 * number, np.sqrt(number / 40)
        x, y = 0.42 * radius * np.cos(angle), 0.25 + 0.18 * radius * np.sin(angle)
        pen.fill(_ellipse(x, y, 0.014, 0.014), dark, 0.5)
    if identity.mole:
        pen.fill(_ellipse(*identity.mole, 0.03, 0.03), shade(identity.skin, 0.4), 0.5)


def _draw_beard(pen: _Pen, identity: Identity) -> None:
    color = mix(identity.hair, identity.skin, 0.2)
    if identity.beard:
        width, low = identity.head_width, identity.chin + 0.03
        side = 0.05 + 0.45 * (1 - identity.beard)
        beard = [
            (0.0, identity.mouth_y + 0.16 - 0.1 * identity.beard),
            (identity.mouth_width + 0.06, identity.mouth_y - 0.02),
            (width * identity.cheek * 0.86, side + 0.1),
            (width * identity.cheek * 0.98, side),
            (width * identity.jaw * 1.02, 0.62),
            (identity.chin_width * 1.05, low - 0.03),
            (0.0, low),
        ]
        pen.fill(_smooth(_mirrored(beard)), color, 0.12)
    if identity.moustache:
        y = identity.mouth_y - identity.upper_lip - 0.04
        low = y + identity.moustache
        pen.fill(
            _smooth(_mirrored([(0.0, y - 0.03), (0.17, y), (0.3, low), (0.0, low)])), color, 0.62
        )


def _draw_nose(pen: _Pen, identity: Identity) -> None:
    width, bridge = identity.nose_width, identity.nose_bridge
    tip = -0.05 + identity.nose_length
    nose = [
        (0.0, -0.1),
        (bridge, -0.02),
        (bridge * 1.2, tip - 0.14),
        (width, tip),
        (0.0, tip + 0.05),
    ]
    pen.fill(_smooth(_mirrored(nose)), shade(identity.skin, 0.9), 0.66)
    pen.fill(_ellipse(0, tip - 0.04, width * 0.55, 0.075), shade(identity.skin, 1.05), 0.74)
    for side in (-1, 1):
        x = side * width * 0.52
        pen.fill(_ellipse(x, tip + 0.025, 0.032, 0.02), shade(identity.skin, 0.5), 0.68)


def _draw_mouth(pen: _Pen, identity: Identity, conditions: Conditions) -> None:
    half = identity.mouth_width * (1 + 0.14 * conditions.smile)
    x = np.linspace(-1, 1, 17)
    line = identity.mouth_y + 0.09 * conditions.smile * (1 - 2 * x**2) * 0.6
    gap = 0.11 * conditions.mouth_open * (1 - x**2)
    bow = 1 - 0.25 * np.exp(-np.square(x / 0.18))
    upper = line - identity.upper_lip * (1 - x**2) * bow
    lower = line + gap + identity.lower_lip * (1 - x**2)

    def band(top: Points, bottom: Points) -> Points:
        return np.concatenate(
            [np.stack([half * x, top], axis=1), np.stack([half * x, bottom], axis=1)[::-1]]
        )

    pen.fill(band(upper, line + 0.012), shade(identity.lips, 0.88), 0.58)
    pen.fill(band(line + gap, lower), identity.lips, 0.58)
    if conditions.mouth_open:
        pen.fill(band(line, line + gap), (74, 24, 28), 0.56)
        pen.fill(band(line, line + gap * 0.4), WHITE, 0.56)
    else:
        pen.fill(band(line - 0.008, line + 0.012), shade(identity.lips, 0.5), 0.58)


def _draw_eyes(pen: _Pen, identity: Identity, conditions: Conditions) -> None:
    wide, high = identity.eye_width, identity.eye_height * conditions.eye_open
    for side in (-1, 1):
        x, y, tilt = side * identity.eye_x, -0.08, -side * identity.eye_slant
        pen.fill(_ellipse(x, y, wide * 1.2, high * 1.5, tilt), shade(identity.skin, 0.88), 0.48)
        pen.fill(_ellipse(x, y - 0.014, wide * 1.06, high * 1.12, tilt), (40, 30, 30), 0.48)
        pen.fill(_ellipse(x, y, wide, high, tilt), WHITE, 0.48)
        iris_x, size = x + conditions.gaze, identity.iris_size
        pen.fill(_ellipse(iris_x, y, size, min(size, high)), shade(identity.iris, 0.7), 0.48)
        pen.fill(_ellipse(iris_x, y, size * 0.82, min(size * 0.82, high)), identity.iris, 0.48)
        pen.fill(_ellipse(iris_x, y, size * 0.42, min(size * 0.42, high)), (14, 12, 14), 0.48)
        pen.fill(_ellipse(iris_x + 0.025, y - 0.025, 0.018, 0.018), (255, 255, 255), 0.48)


def _draw_brows(pen: _Pen, identity: Identity, conditions: Conditions) -> None:
    color = mix(shade(identity.hair, 0.75), identity.skin, 0.12)
    along = np.linspace(-1, 1, 9)
    taper = identity.brow_thickness * (1 - 0.55 * np.clip(along, 0, 1) ** 2)
    y = -0.08 - identity.brow_height - conditions.brow_raise
    middle = y - identity.brow_arch * (1 - along**2) - identity.brow_slant * 0.16 * along
    for side in (-1, 1):
        x = side * (identity.eye_x + identity.brow_length * along)
        edges = [np.stack([x, middle - taper], axis=1), np.stack([x, middle + taper], axis=1)[::-1]]
        pen.fill(np.concatenate(edges), color, 0.5)


def _draw_back_hair(pen: _Pen, identity: Identity) -> None:
    if not identity.hair_volume or identity.hair_length < 0.2:
        return
    wide = identity.head_width + identity.hair_volume * 1.3
    top = -identity.head_top - identity.hair_volume
    length = identity.hair_length
    back = [(0.0, top), (wide * 0.75, top + 0.15), (wide, -0.3), (wide * 1.03, length * 0.5)]
    outline = _smooth(_mirrored([*back, (wide * 0.9, length), (0.0, length + 0.05)]))
    pen.fill(_sway(outline, identity.hair_curl, 13), shade(identity.hair, 0.72), -0.25)


def _draw_front_hair(pen: _Pen, identity: Identity) -> None:
    if not identity.hair_volume:
        return
    wide = identity.head_width + identity.hair_volume * 0.7
    top = identity.head_top + identity.hair_volume
    angles = np.linspace(np.pi, 0, 25)
    outer = np.stack([wide * np.cos(angles), -0.3 - (top - 0.3) * np.sin(angles)], axis=1)
    outer = _sway(outer, identity.hair_curl * 1.6, 7.5)
    # The hairline: lower at the temples, higher at the parting, over the brow as a fringe.
    x = np.linspace(1, -1, 25)
    part = np.exp(-np.square((x - identity.part) / 0.35))
    line = identity.hairline + identity.fringe * (1 - 0.7 * part) - 0.08 * part
    line = line + np.where(np.abs(x) > 0.8, (np.abs(x) - 0.8) * 2.2, 0.0)
    inner = np.stack([x * identity.head_width * 0.98, line], axis=1)
    cap = np.concatenate([outer, inner])
    pen.fill(cap, identity.hair, 0.14)
    gleam = shade(identity.hair, 1.22)
    pen.fill(_ellipse(0.3 * identity.part - 0.15, -top * 0.86, 0.24, 0.045, 0.12), gleam, 0.14)


def _draw_glasses(pen: _Pen, identity: Identity) -> None:
    for side in (-1, 1):
        angles = np.linspace(0, 2 * np.pi, 28)
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (1, 0.82)
        radii = (identity.glasses, identity.glasses - 0.03)
        around, within = (ring * radius + (side * identity.eye_x, -0.07) for radius in radii)
        pen.fill(np.concatenate([around, within[::-1]]), identity.glasses_color, 0.6)
    bridge = identity.eye_x - identity.glasses + 0.02
    pen.fill(
        np.array([(-bridge, -0.11), (bridge, -0.11), (bridge, -0.08), (-bridge, -0.08)]),
        identity.glasses_color,
        0.64,
    )


def _draw_occlusion(pen: _Pen, identity: Identity, conditions: Conditions) -> None:
    color = conditions.occlusion_color
    match conditions.occlusion:
        case "hat":
            wide = identity.head_width + 0.14
            brim = identity.hairline + 0.08
            pen.fill(
                _smooth(_mirrored([(0.0, -1.4), (wide, -1.2), (wide, brim), (0.0, brim)])), color
            )
            edge = [(-wide - 0.1, brim - 0.1), (wide + 0.1, brim - 0.1), (wide + 0.1, brim)]
            pen.fill(np.array([*edge, (-wide - 0.1, brim)]), shade(color, 0.7), 0.25)
        case "sunglasses":
            for side in (-1, 1):
                pen.fill(_ellipse(side * identity.eye_x, -0.06, 0.25, 0.19), (24, 24, 30), 0.6)
            pen.fill(_ellipse(0, -0.12, 0.2, 0.03), (24, 24, 30), 0.64)
        case "scarf":
            wide = identity.head_width + 0.08
            scarf = [(0.0, 0.42), (wide * 0.7, 0.38), (wide, 0.3), (wide, 1.3), (0.0, 1.4)]
            pen.fill(_smooth(_mirrored(scarf)), color, 0.3)
        case "blob":
            pen.fill(_ellipse(*conditions.occlusion_at, 0.34, 0.3), color, 0.7)


# --- the photograph -------------------------------------------------------------------------------

_GRID = np.linspace(-1, 1, SIZE, dtype=np.float32)


def _photograph(
    image: Image.Image, conditions: Conditions, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Light from a side, colour cast, contrast, blur and noise."""
    if conditions.blur:
        image = image.filter(ImageFilter.GaussianBlur(conditions.blur))
    pixels = np.asarray(image, np.float32)
    gray = pixels.mean(axis=2, keepdims=True)
    pixels = pixels + conditions.gray * (gray - pixels)
    light = 1 + conditions.light[0] * _GRID + conditions.light[1] * _GRID[:, None]
    gain = light[..., None] * np.array(conditions.cast, np.float32) * conditions.contrast
    noise = conditions.noise * rng.standard_normal(pixels.shape, np.float32)
    pixels = (pixels - 128) * gain + 128 * gain + conditions.brightness + noise
    return np.asarray(np.clip(pixels, 0, 255), np.uint8)


def _rgb(color: Color) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, round(part))) for part in color)
    return red, green, blue
