"""A plan as a table and as a plot."""

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from gkd.pipeline.plan.forecast import DEVICES, Plan, PlanPoint
from gkd.pipeline.settings import PartitionSettings
from gkd.storage.util.plotting import new_figure, write_png
from gkd.storage.util.text import printable

MAX_COLUMNS = 5  # thresholds side by side in 80 columns


def plan_table(plan: Plan) -> Table:
    """A section for each group temperature, with a row for each quantity."""
    title = f"{plan.images:,} images of {plan.classes:,} identities, {plan.shards:,} shards"
    table = Table(
        title=Text(printable(f"{plan.records}: {title}")),
        box=box.SIMPLE,
        padding=0,
        show_header=False,
    )
    for temperature, points in _by_temperature(plan):
        for start in range(0, len(points), MAX_COLUMNS):
            columns = points[start : start + MAX_COLUMNS]
            table.add_row(f"[bold]group temperature {temperature:g}[/bold]")
            rows = list(zip(_LABELS, *map(_cells, columns), strict=True))
            for row in rows:
                table.add_row(*row, end_section=row is rows[-1])
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        if number:
            column.justify, column.min_width = "right", 8
    return table


def verdict(plan: Plan, chosen: PartitionSettings) -> str:
    """What cache-teacher makes with the chosen settings, in two lines; empty if not in the plan."""
    for point in plan.points:
        where = point.group_temperature, point.threshold
        if where == (chosen.group_temperature, chosen.threshold):
            return (
                f"with these options (group temperature {where[0]:g}, threshold {where[1]:g}) "
                f"cache-teacher makes\n{_size(point.bytes)} in {_time(point.seconds)} here: "
                f"groups of {point.mean_size:,.1f} classes, "
                f"{plan.draws.count if plan.draws else 'no'} draws per image and view"
            )
    return ""


def _by_temperature(plan: Plan) -> list[tuple[float, list[PlanPoint]]]:
    points: dict[float, list[PlanPoint]] = {}
    for point in plan.points:
        points.setdefault(point.group_temperature, []).append(point)
    return list(points.items())


_LABELS = (
    "threshold",
    "median group size",
    "mean group size",
    "95th percentile of sizes",
    "mass in group",
    "truncated groups",
    "bytes per image",
    "cache size",
    "standard error of size",
    *("time" if devices == 1 else f"time on {devices} devices" for devices in DEVICES),
)


def _cells(point: PlanPoint) -> list[str]:
    return [
        f"{point.threshold:g}",
        f"{point.median_size:,.0f}",
        f"{point.mean_size:,.{0 if point.mean_size >= 100 else 1}f}",
        f"{point.p95_size:,.0f}",
        f"{point.mass:.3f}",
        f"{point.truncated:.1%}",
        f"{point.bytes_per_sample:,.0f}",
        _size(point.bytes),
        "unknown" if point.error is None else f"±{point.error:.0%}",
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
    """Plot group sizes and cache sizes by threshold into a PNG.

    Raises:
        ConfigError: if matplotlib is not installed, or ``out`` cannot be written.
    """
    figure = new_figure(10, 4)
    sizes, caches = figure.subplots(1, 2)
    for number, (temperature, points) in enumerate(_by_temperature(plan)):
        points.sort(key=lambda point: point.threshold)
        thresholds = [point.threshold for point in points]
        colour, label = f"C{number}", f"{temperature:g}"
        median = [point.median_size for point in points]
        sizes.plot(thresholds, median, "o-", color=colour, label=label)
        sizes.plot(thresholds, [point.p95_size for point in points], "--", color=colour)
        caches.plot(thresholds, [point.bytes / 1e9 for point in points], "o-", color=colour)
    ticks = sorted({point.threshold for point in plan.points})
    for axes, what in ((sizes, "group size: median, 95th percentile"), (caches, "cache size, GB")):
        axes.set(yscale="log", xlabel="threshold", ylabel=what)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
        axes.grid(alpha=0.3)
    sizes.legend(title="group temperature")
    figure.suptitle(f"{plan.images:,} images of {plan.classes:,} identities")
    write_png(figure, out)
