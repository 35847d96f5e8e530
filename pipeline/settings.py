"""What determines a primary group, what is drawn, and how a cache of them is made."""

import math
from dataclasses import dataclass, field

from gkd.storage.cache.spec import MAX_GROUP, MAX_SCALE, VIEWS, CenterPrecision, DrawsSpec, View
from gkd.storage.errors import ConfigError

MAX_SHARD_SAMPLES = 65_536
MAX_SHARD_BYTES = 256_000_000
ENTRY_BYTES = 6
# What the command line draws by default.
DRAWS = DrawsSpec(64, 4.0, "all")


@dataclass(frozen=True, kw_only=True)
class PartitionSettings:
    """What determines a primary group.

    z = scale * (cosine - margin * [class = label]);  p(T) = softmax(z / T)
    Group: shortest prefix by descending z (ties: lower class first) with
    sum p(group_temperature) >= threshold, and always the label; at most ``max_group`` classes.
    The secondary mass is computed at each of ``temperatures``. Classes are drawn as ``draws``
    says, at one of these.

    Raises:
        ConfigError: if a value is out of range.
    """

    threshold: float = 0.93
    group_temperature: float = 1.0
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    max_group: int = 4096
    scale: float = 64.0
    margin: float = 0.4
    draws: DrawsSpec | None = None

    def __post_init__(self) -> None:
        given = self.temperatures
        temperatures = ",".join(f"{t:g}" for t in given) or "none"
        positive = len(given) > 0 and all(map(_is_positive, given))
        group = f"a number from 1 to {MAX_GROUP:,}"
        rules: list[tuple[str, object, bool, str]] = [
            ("--threshold", self.threshold, 0 <= self.threshold <= 1, "from 0 to 1"),
            (
                "--group-temperature",
                self.group_temperature,
                _is_positive(self.group_temperature),
                "a finite number above 0",
            ),
            ("--temperatures", temperatures, positive, "one or more finite numbers above 0"),
            ("--temperatures", temperatures, len(set(given)) == len(given), "each number once"),
            ("--max-group", self.max_group, 1 <= self.max_group <= MAX_GROUP, group),
            (
                "--scale",
                self.scale,
                0 < self.scale <= MAX_SCALE,
                f"a number above 0, at most {MAX_SCALE:g}",
            ),
            ("--margin", self.margin, math.isfinite(self.margin), "a finite number"),
        ]
        if self.draws is not None:
            rules.append(("--draws", self.draws.count, 1 <= self.draws.count <= MAX_GROUP, group))
        for option, value, holds, expected in rules:
            if not holds:
                remedy = "correct it, or leave it at its default"
                raise ConfigError(option, expected=expected, got=value, remedy=remedy)
        if self.draws is not None and self.draws.temperature not in given:
            raise ConfigError(
                f"--draw-temperature: expected one of --temperatures, which are {temperatures}, "
                f"got {self.draws.temperature:g}; add it to these, draw at one of them, or leave "
                "draws out with --draws 0"
            )

    @property
    def draws_from_group(self) -> bool:
        """Whether classes are drawn from the primary group, before ``max_group`` cuts it."""
        return self.draws is not None and self.draws.source == "primary"

    @property
    def max_candidates(self) -> float:
        """How many of a row's largest logits can matter."""
        return math.inf if self.draws_from_group else self.max_group


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How a cache is made; ``partition`` and ``views`` determine what it holds.

    ``licence`` and ``note`` are texts for the card. ``center_precision`` is that of the centres in
    memory: half precision takes half the memory, and the run reports the rounding.
    ``shard_samples`` None leaves it to ``samples_per_shard``, ``batch_size`` and ``class_chunk``
    None to the device.

    Raises:
        ConfigError: if a value is out of range.
    """

    partition: PartitionSettings = field(default_factory=PartitionSettings)
    views: tuple[View, ...] = VIEWS
    batch_size: int | None = None
    workers: int = 2
    skip_corrupt: bool = False
    shard_samples: int | None = None
    class_chunk: int | None = None
    center_precision: CenterPrecision = "float32"
    licence: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        for option in ("--batch-size", "--workers", "--shard-samples", "class_chunk"):
            value = getattr(self, option.strip("-").replace("-", "_"))
            if value is not None and value < 1:
                remedy = "give another number"
                raise ConfigError(option, expected="1 or more", got=value, remedy=remedy)
        if not self.views or self.views != tuple(v for v in VIEWS if v in self.views):
            raise ConfigError(
                "--views",
                expected="original, flipped or both in this order",
                got=",".join(self.views) or "none",
                remedy="give --views original,flipped",
            )

    def samples_per_shard(self, num_samples: int) -> int:
        """``shard_samples``, or the largest power of two <= 65,536 that keeps shards small.

        Small means at most 256 MB of entries and draws per view. A smaller data set is one shard.
        """
        if self.shard_samples is not None:
            return self.shard_samples
        draws = self.partition.draws
        entries = self.partition.max_group + (draws.count if draws else 0)
        samples = MAX_SHARD_SAMPLES
        while samples > 1 and ENTRY_BYTES * entries * samples > MAX_SHARD_BYTES:
            samples //= 2
        return min(samples, num_samples)


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0
