"""A plan as a table and as a picture."""

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gkd.pipeline.plan.forecast import DEVICES, Plan, PlanPoint
from gkd.storage.util.extras import require
from gkd.storage.util.plotting import write_png


def plan_table(plan: Plan) -> Table:
    """A row a group temperature and threshold."""
    table = Table(
        title=f"{plan.records}: {plan.images:,} images of {plan.classes:,} identities, "
        f"{plan.shards:,} shards",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for name in ("T", "threshold", "median", "mean", "95 %", "mass", "cut", "bytes", "cache", "+-"):
        table.add_column(name, justify="right", no_wrap=True)
    for devices in DEVICES:
        table.add_column("time" if devices == 1 else f"on {devices}", justify="right", no_wrap=True)
    for number, point in enumerate(plan.points):
        last = number + 1 == len(plan.points)
        ends = last or plan.points[number + 1].group_temperature != point.group_temperature
        table.add_row(*_cells(point), end_section=ends)
    return table


def _cells(point: PlanPoint) -> list[str]:
    return [
        f"{point.group_temperature:g}",
        f"{point.threshold:g}",
        f"{point.median_size:,.0f}",
        f"{point.mean_size:,.{0 if point.mean_size >= 100 else 1}f}",
        f"{point.p95_size:,.0f}",
        f"{point.mass:.3f}",
        f"{point.truncated:.1%}",
        f"{point.bytes_per_sample:,.0f}",
        _size(point.bytes),
        "?" if point.error is None else f"{point.error:.0%}",
        *(_time(hours * 3600) for hours in point.hours.values()),
    ]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.3g} h"


def plot_plan(plan: Plan, out: Path) -> None:
    """Draw group sizes and cache sizes over the thresholds into a PNG.

    Raises:
        ConfigError: where matplotlib is not installed, or ``out`` cannot be written.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(10, 4), layout="constrained")
    groups, bytes_ = figure.subplots(1, 2)
    temperatures = list(dict.fromkeys(point.group_temperature for point in plan.points))
    for number, temperature in enumerate(temperatures):
        points = [each for each in plan.points if each.group_temperature == temperature]
        points.sort(key=lambda each: each.threshold)
        _draw(groups, bytes_, points, f"C{number}")
    thresholds = sorted({point.threshold for point in plan.points})
    for axes, what in ((groups, "classes in a group: median, 95 %"), (bytes_, "cache, GB")):
        axes.set(yscale="log", xlabel="threshold", ylabel=what)
        axes.set_xticks(thresholds, [f"{each:g}" for each in thresholds], rotation=45)
        axes.grid(alpha=0.3)
    groups.legend(title="group temperature")
    figure.suptitle(f"{plan.images:,} images of {plan.classes:,} identities")
    write_png(figure, out)


def _draw(groups: Any, bytes_: Any, points: list[PlanPoint], colour: str) -> None:
    thresholds = [each.threshold for each in points]
    label = f"{points[0].group_temperature:g}"
    groups.plot(thresholds, [each.median_size for each in points], "o-", color=colour, label=label)
    groups.plot(thresholds, [each.p95_size for each in points], "--", color=colour)
    bytes_.plot(thresholds, [each.bytes / 1e9 for each in points], "o-", color=colour)
