"""``report.html``: one self-contained page on what a run was and how it went.

It is made from the files of the run folder alone, so it can be made again at any time.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from gkd.storage.errors import ConfigError
from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file
from gkd.storage.util.html import render
from gkd.trainer.final_metrics import SetScore
from gkd.trainer.report import figures
from gkd.trainer.run_dir import Run, TrainingLine, read_run

REPORT = "report.html"
NAMES = {
    "loss": "Loss",
    "ce": "CE",
    "primary": "Primary",
    "binary": "Binary",
    "lr": "Learning rate",
    "images_per_second": "Images/s",
}
DASH = "\N{EN DASH}"

Groups = Mapping[str, Sequence[tuple[int, int]]]  # (size, samples) of each view


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder atomically; returns its path.

    Raises:
        ConfigError: if the folder is not a gkd run folder, or it cannot be written to.
    """
    content = _page(read_run(run))
    with disk_errors(run / REPORT):
        write_file(run / REPORT, content)
    return run / REPORT


def _page(run: Run) -> bytes:
    info, metrics = run.info, run.final_metrics
    views: Groups = metrics.groups if metrics else {}
    groups = {view: [(size, n) for size, n in counts if size] for view, counts in views.items()}
    scores = metrics.sets if metrics else ()
    fars = scores[0].tar_at_far if scores else ()
    rates = [far for far in fars if any(score.tar_at_far.get(far) for score in scores)]
    sets = list(dict.fromkeys(name for line in run.evaluations for name in line.accuracy))
    missing = ""
    try:
        require("matplotlib.figure", "plot")
    except ConfigError as error:
        missing = str(error)
    return render(
        Path(__file__).with_name("report.html"),
        run=run,
        data=info.dataset,
        headline=_headline(run),
        missing=missing,
        figures={} if missing else _figures(run, scores, groups, sets),
        titles=list(NAMES.values()),
        epochs=list(_epochs(run)),
        scores=scores,
        rates=rates,
        tar_titles=[f"TAR@{rate}" for rate in rates],
        sets=sets,
        groups=groups,
        group_sums={view: _sum_up(counts) for view, counts in views.items()},
        group_sizes=list(_group_sizes(groups)),
        cosines=metrics.identity_cosines if metrics else None,
        percent=_percent,
        command=shlex.join(info.command),
        origin={
            "Records": info.dataset.path,
            "Data set fingerprint": info.dataset.dataset,
            "Cache id": info.dataset.cache_id or "none: trained without distillation",
            "Parameters": ", ".join(f"{name} {n:,}" for name, n in info.parameters.items()),
            "Ranks": f"{info.ranks:,}",
            "Device": info.device,
            "Precision": info.precision,
            "Versions": ", ".join(f"{name} {n}" for name, n in info.versions.items()),
        },
    )


def _figures(
    run: Run, scores: Sequence[SetScore], groups: Groups, sets: Sequence[str]
) -> dict[str, str]:
    drawn = {}
    if run.training:
        curves = {}
        for name, title in NAMES.items():
            values = _column(run.training, name)
            if any(values):
                lines = [line for line in run.training if getattr(line, name) is not None]
                curves[title] = [line.epoch for line in lines], values
        drawn["training"] = figures.draw_curves(curves, "epoch")
    if run.evaluations:
        accuracies = {}
        for name in sets:
            evaluated = [line for line in run.evaluations if name in line.accuracy]
            epochs = [line.epoch for line in evaluated]
            accuracies[name] = epochs, [line.accuracy[name] for line in evaluated]
        drawn["accuracy"] = figures.draw_lines(accuracies, "epoch", "accuracy")
    if run.evaluations and scores:
        drawn["roc"] = figures.draw_roc({score.name: score.roc for score in scores})
    if groups:
        drawn["groups"] = figures.draw_sizes(groups)
    return drawn


def _headline(run: Run) -> dict[str, str]:
    values = {}
    if run.evaluations:
        means = [fmean(line.accuracy.values() or [0.0]) for line in run.evaluations]
        values["Accuracy, mean of the sets"] = f"{means[-1]:.2%}"
        values["Best of the training"] = f"{max(means):.2%}"
    if run.training:
        values["Cross-entropy, last"] = _number(run.training[-1].ce)
        values["Images/s, median"] = _number(median(_column(run.training, "images_per_second")))
        values["Wait for data, median"] = f"{median(_column(run.training, 'data_wait')):.1%}"
    values["Steps skipped"] = f"{len(run.skipped):,}"
    return values


def _column(lines: Sequence[TrainingLine], name: str) -> list[float]:
    return [value for line in lines if (value := getattr(line, name)) is not None]


def _epochs(run: Run) -> Iterator[list[str]]:
    epochs: dict[int, list[TrainingLine]] = {}
    for line in run.training:
        # The last line of epoch 1 is at epoch 1.0.
        epochs.setdefault(max(1, math.ceil(line.epoch)), []).append(line)
    for epoch, lines in epochs.items():
        columns = [_column(lines, name) for name in NAMES if name != "lr"]
        means = [_number(fmean(column)) if column else DASH for column in columns]
        means.insert(list(NAMES).index("lr"), _number(lines[-1].lr))
        yield [str(epoch), *means, f"{fmean(_column(lines, 'data_wait')):.1%}"]


def _sum_up(counts: Sequence[tuple[int, int]]) -> tuple[int, float, int]:
    """Samples of a view, mean size of their groups, and skipped samples."""
    samples = sum(n for size, n in counts if size)
    mean_size = sum(size * n for size, n in counts) / max(samples, 1)
    return samples, mean_size, sum(n for size, n in counts if not size)


def _group_sizes(groups: Groups) -> Iterator[tuple[str, list[int]]]:
    """Samples of each view by size, in ranges that double: 1, 2-3, 4-7 ..."""
    largest = max((size for counts in groups.values() for size, _ in counts), default=0)
    for power in range(largest.bit_length()):
        first, last = 1 << power, min((2 << power) - 1, largest)
        yield (
            f"{first:,}" if first == last else f"{first:,}{DASH}{last:,}",
            [sum(n for size, n in c if first <= size <= last) for c in groups.values()],
        )


def _number(value: float | None) -> str:
    """Four significant digits, as a whole number from 1000 on."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.2%}"
