"""The spec of a cache: every number and digest that decides its bytes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from gkd.storage.errors import ConfigError
from gkd.storage.records.labels import LabelOrder
from gkd.storage.util.torch_device import Precision

if TYPE_CHECKING:
    import torch

FORMAT = 1
MAX_SCALE = 1024.0
MAX_GROUP = 65535
MAX_SHARD_NUMBERS = 1 << 26  # of a shard and view in one chunk, apart from the entries
# What does not decide a cache's arrays: names (a sha256 identifies each thing) and versions.
NAME_FIELDS = ("software", "teacher.name", "centers.name", "dataset.name")
# Why a run differs in a field from what it would resume, where the values do not tell.
_RESUME_HINTS = {
    "pixels": "It was begun by an older version, which ignored the EXIF orientation of images.",
    "batch_size": "A GPU's results depend on its batch size, which a CPU's do not have: resume "
    "on the same kind of device, with that --batch-size.",
}
View = Literal["original", "flipped"]
VIEWS: tuple[View, ...] = ("original", "flipped")
CentersKind = Literal["file", "class-mean", "refined"]


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How pixels become a network's input: ``(x - mean) / std`` per channel, x in 0..255.

    ``mean`` and ``std`` follow the channel order of the input, which is RGB, or BGR if
    ``bgr``.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False

    def apply(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """RGB images uint8 [B, H, W, 3] to network input float32 [B, 3, H, W]."""
        if self.bgr:
            images = images[..., ::-1]
        scale = 1.0 / np.asarray(self.std, np.float32)
        shift = -np.asarray(self.mean, np.float32) * scale
        return np.ascontiguousarray((images * scale + shift).transpose(0, 3, 1, 2), np.float32)

    def on_device(self, device: "torch.device") -> "Callable[[torch.Tensor], torch.Tensor]":
        """``apply`` as a function on tensors of a device, to the same bits.

        It takes RGB images uint8 [B, H, W, 3] and returns float32 [B, 3, H, W], channels last in
        memory.
        """
        import torch

        # Created once: copying them to a GPU in each step would make the host wait.
        scale = 1 / torch.tensor(self.std, device=device)
        shift = -torch.tensor(self.mean, device=device) * scale

        def apply(images: torch.Tensor) -> torch.Tensor:
            images = images.flip(3) if self.bgr else images
            return images.mul(scale).add_(shift).permute(0, 3, 1, 2)

        return apply


_Channels = tuple[float, float, float]
# Mean and std of R, G and B.
_PRESETS: dict[str, tuple[_Channels, _Channels]] = {
    "arcface": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": (
        (0.485 * 255, 0.456 * 255, 0.406 * 255),
        (0.229 * 255, 0.224 * 255, 0.225 * 255),
    ),
    "raw": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "div128": ((127.5, 127.5, 127.5), (128.0, 128.0, 128.0)),
}
PRESETS = tuple(_PRESETS)


def preprocess_preset(name: str, *, bgr: bool = False) -> Preprocess:
    """Preprocessing by name.

    ``arcface`` is (x/255 - 0.5)/0.5, ``imagenet`` its mean and deviation, ``raw`` 0..255, ``unit``
    x/255, and ``div128`` (x - 127.5)/128, for a pixel x of 0 to 255.

    Raises:
        ConfigError: if the name is unknown.
    """
    if name not in _PRESETS:
        raise ConfigError(f"preprocess: expected one of {', '.join(PRESETS)}, got {name!r}")
    (r, g, b), (r_std, g_std, b_std) = _PRESETS[name]
    if bgr:
        return Preprocess(name, (b, g, r), (b_std, g_std, r_std), bgr)
    return Preprocess(name, (r, g, b), (r_std, g_std, b_std), bgr)


def custom_preprocess(
    mean: Sequence[float], std: Sequence[float], *, pixel_max: float = 255.0, bgr: bool = False
) -> Preprocess:
    """Preprocessing ``(pixel - mean) / std`` of pixels 0 to ``pixel_max``, one value or three each.

    Three values are in the order of the input's channels.

    Raises:
        ConfigError: for another number of values, or one that is not finite, or not positive.
    """
    for option, values, least in (
        ("--mean", mean, -math.inf),
        ("--std", std, 0.0),
        ("--pixel-max", (pixel_max,), 0.0),
    ):
        if len(values) not in (1, 3) or not all(least < v < math.inf for v in values):
            raise ConfigError(
                expected=f"one or three numbers for {option}" + (", above 0" if not least else ""),
                got=", ".join(f"{value:g}" for value in values) or "none",
            )
    scale = 255.0 / pixel_max
    (m0, m1, m2), (s0, s1, s2) = (
        [value * scale for value in (list(values) * 3 if len(values) == 1 else values)]
        for values in (mean, std)
    )
    if not all(math.isfinite(value / std) for value in (m0, m1, m2, 255.0) for std in (s0, s1, s2)):
        raise ConfigError(
            "--mean, --std and --pixel-max",
            expected="values that turn pixels into finite numbers",
            got=f"a mean of {m0:g} and a deviation of {s0:g} for pixels of 0 to 255",
        )
    return Preprocess("custom", (m0, m1, m2), (s0, s1, s2), bgr)


def preprocess_options(preprocess: Preprocess) -> str:
    """The options of the command line that choose a preprocessing."""
    bgr = " --bgr" * preprocess.bgr
    if preprocess.name in _PRESETS:
        return f"--preprocess {preprocess.name}{bgr}"
    mean, std = (
        ",".join(f"{v:.9g}" for v in values) for values in (preprocess.mean, preprocess.std)
    )
    return f"--mean {mean} --std {std}{bgr}"


class TeacherSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The network whose predictions are cached; ``sha256`` is of its weights file.

    ``compiled``: torch.compile made its kernels; JSON omits it if false.
    """

    name: str
    arch: str
    sha256: str
    embedding_dim: int
    compiled: bool = False


CenterPrecision = Precision


class CentersSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The teacher's class centres; ``sha256`` is of the normalised float32 [C, D] array.

    ``file``: the teacher's own; ``class-mean``: the mean of each class's embeddings; ``refined``:
    these, trained further by a margin head over frozen embeddings. Logits are computed from the
    array rounded to ``rounded_to``, if that is set.
    """

    kind: CentersKind
    name: str
    sha256: str
    rounded_to: Literal["float16", "bfloat16"] | msgspec.UnsetType = msgspec.UNSET

    @property
    def precision(self) -> CenterPrecision:
        """Precision of the centres in the products."""
        return "float32" if self.rounded_to is msgspec.UNSET else self.rounded_to


class DatasetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cached records; ``fingerprint`` is of labels and encoded sizes in row order."""

    name: str
    num_images: int
    num_classes: int
    label_order: LabelOrder
    fingerprint: str


class DrawsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Classes drawn with replacement from the teacher's prediction softened by ``temperature``.

    ``source`` is all classes, or the primary group before ``max_group`` truncates it. ``seed`` is
    that of the random numbers; JSON omits a 0.
    """

    count: int
    temperature: float
    source: Literal["primary", "all"]
    seed: int = 0


class DerivedSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a cache was made from others without a teacher; ``caches`` are their ids, in order."""

    operation: Literal["retarget", "merge", "views"]
    caches: tuple[str, ...]


@dataclass(frozen=True)
class Sharding:
    """Rows 0..num_samples of a data set in shards of ``shard_samples``, the last one shorter."""

    num_samples: int
    shard_samples: int

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return -(-self.num_samples // self.shard_samples)

    def rows(self, shard: int) -> range:
        """Rows that a shard holds."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.num_samples))

    def shard_of(self, row: int) -> int:
        """The shard that holds a row."""
        return row // self.shard_samples

    def of_rank(self, rank: int, world_size: int) -> range:
        """Shards that a rank writes: by number, as ranks list what is left at different times."""
        return range(rank, self.num_shards, world_size)

    def count_rows(self, shards: Iterable[int]) -> int:
        """Rows of some shards together."""
        return sum(len(self.rows(shard)) for shard in shards)


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attributes of a cache's root group (format 1), see ``storage/FORMAT.md``.

    Only a cache that was made from other caches has ``derived``. ``pixels`` is the rule by which
    images were decoded; caches without it ignored EXIF orientations. ``batch_size`` is that of an
    accelerator, where it may change a teacher's last bits; JSON omits it for a CPU. Two runs with
    equal specs, apart from ``software``, write equal bytes on one kind of device.
    """

    format: int = FORMAT
    num_samples: int
    num_classes: int
    shard_samples: int
    max_group: int
    threshold: float
    group_temperature: float
    temperatures: tuple[float, ...]
    scale: float
    margin: float
    views: tuple[View, ...]
    preprocess: Preprocess
    pixels: Literal["opencv"] | msgspec.UnsetType = msgspec.UNSET
    precision: Precision
    batch_size: int | msgspec.UnsetType = msgspec.UNSET
    teacher: TeacherSpec
    centers: CentersSpec
    dataset: DatasetSpec
    draws: DrawsSpec | None = None
    derived: DerivedSpec | msgspec.UnsetType = msgspec.UNSET
    software: dict[str, str]

    def __post_init__(self) -> None:
        """Check that format 1 can hold the numbers.

        Raises:
            ConfigError: naming the field, what it must be and what it is.
        """
        positive = "a positive finite number"
        draws = self.draws.count if self.draws else 0
        rules: dict[str, tuple[str, bool]] = {
            "format": (f"{FORMAT}, the format of this version of gkd", self.format == FORMAT),
            "num_samples": ("1 or more", self.num_samples >= 1),
            "num_classes": ("1 to 2^32", 1 <= self.num_classes <= 2**32),
            "shard_samples": (
                "1 to 2^24, times temperatures or draws at most 2^26",
                1 <= self.shard_samples <= 2**24
                and self.shard_samples * max(len(self.temperatures), draws) <= MAX_SHARD_NUMBERS,
            ),
            "batch_size": ("1 or more", self.batch_size is msgspec.UNSET or self.batch_size >= 1),
            "max_group": ("1 to 65535", 1 <= self.max_group <= MAX_GROUP),
            "threshold": ("0 to 1", 0 <= self.threshold <= 1),
            "group_temperature": (positive, _positive(self.group_temperature)),
            "temperatures": (
                "one or more different positive numbers",
                0 < len(self.temperatures) == len(set(self.temperatures))
                and all(map(_positive, self.temperatures)),
            ),
            "scale": (positive, _positive(self.scale)),
            "margin": ("a finite number", math.isfinite(self.margin)),
            "views": (
                "original, flipped or both, in this order",
                self.views in (VIEWS, VIEWS[:1], VIEWS[1:]),
            ),
            "draws": (
                "1 or more draws at one of the temperatures",
                self.draws is None
                or (self.draws.count >= 1 and self.draws.temperature in self.temperatures),
            ),
        }
        for field, (expected, holds) in rules.items():
            if not holds:
                raise ConfigError(
                    f"cache spec: {field}: expected {expected}, got {getattr(self, field)!r}"
                )

    @property
    def sharding(self) -> Sharding:
        """Which rows of the data set each shard holds."""
        return Sharding(self.num_samples, self.shard_samples)

    @property
    def num_shards(self) -> int:
        """Rows of every array."""
        return self.sharding.num_shards

    def shard_rows(self, shard: int) -> range:
        """Rows of the data set that a shard holds."""
        return self.sharding.rows(shard)


def resume_hints(differences: Iterable[str]) -> str:
    """Why lines of ``describe_differences`` keep a run from resuming, a line each."""
    return "".join(
        f"\n{_RESUME_HINTS[field]}"
        for field in (line.partition(":")[0] for line in differences)
        if field in _RESUME_HINTS
    )


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0
