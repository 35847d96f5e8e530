"""The table of a plan at the width of a small terminal."""

import io

from rich.console import Console

from gkd.pipeline.plan.forecast import Plan, PlanPoint
from gkd.pipeline.plan.show import plan_table

THRESHOLDS = (0.8, 0.9, 0.93, 0.95, 0.99, 0.995, 0.999)


def point(temperature: float, threshold: float) -> PlanPoint:
    return PlanPoint(
        group_temperature=temperature,
        threshold=threshold,
        median_size=36_232,
        mean_size=36_232.5,
        p95_size=93_431,
        mass=0.931,
        truncated=1.0,
        bytes_per_sample=246_123,
        bytes=2_893_000_000,
        error=0.031,
        seconds=300_000,
        images_per_second=19.4,
        hours={1: 300_000 / 3600, 8: 300_000 / 8 / 3600},
    )


def test_a_table_of_long_values_is_complete_in_80_columns() -> None:
    plan = Plan(
        records="[red]ms1m\x1b[2J",
        images=5_822_653,
        classes=93_431,
        shards=89,
        views=("original", "flipped"),
        draws=None,
        teacher="teacher",
        centers="class-mean",
        device="cpu",
        precision="float32",
        sampled=4096,
        embedded=4096,
        teacher_images_per_second=100.0,
        basis=(),
        points=tuple(point(t, p) for t in (1.0, 2.5) for p in THRESHOLDS),
    )
    output = io.StringIO()
    Console(file=output, width=80).print(plan_table(plan))
    text = output.getvalue()
    for words in (
        "[red]ms1m\ufffd[2J: ",
        "group temperature 2.5",
        "95th percentile of sizes",
        "time on 8 devices",
    ):
        assert words in text
    for cell in ("0.995", "36,232", "93,431", "246,123", "2.89 GB", "±3%", "83.3 h", "10.4 h"):
        assert text.count(cell) >= 2, cell
    assert text.count("2.89 GB") == text.count("246,123") == 2 * len(THRESHOLDS)
    assert max(map(len, text.splitlines())) <= 80
