"""``report.html``: one self-contained page that tells what a run was and how it went.

It is made from the files of the run folder alone, so it can be made again at any time.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from gkd.storage.errors import ConfigError
from gkd.storage.util import html as page
from gkd.storage.util.extras import require
from gkd.storage.util.files import disk_errors, write_file
from gkd.trainer.final_metrics import SetScore
from gkd.trainer.identity_cosines import FitSummary
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
SHOWN_SKIPPED = 20
DASH = "\N{EN DASH}"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all; returns its path.

    Raises:
        ConfigError: where the folder is none of a run, its files are none of gkd's, or it cannot
            be written to.
    """
    content = _page(read_run(run))
    with disk_errors(run / REPORT):
        write_file(run / REPORT, content)
    return run / REPORT


def _page(run: Run) -> bytes:
    drawing, missing = True, ""
    try:
        require("matplotlib.figure", "plot")
    except ConfigError as error:
        drawing, missing = False, f"There are no figures here: {error}, then: gkd report {run.path}"
    body = [
        page.heading(1, run.path.name),
        page.paragraph(_subtitle(run), dim=True),
        page.tiles(_headline(run)),
        *([page.paragraph(missing)] if missing else []),
        *_training(run, drawing),
        *_verification(run, drawing),
        *_groups(run, drawing),
        *_identities(run.findings.fit if run.findings else None),
        *_origin(run),
    ]
    return page.page(f"{run.path.name} {DASH} gkd", body)


def _subtitle(run: Run) -> str:
    data = run.described.dataset
    total = run.described.total_steps
    state = "finished" if run.step >= total else "not finished"
    return (
        f"A student on {data.name}: {data.num_images:,} images, "
        f"{data.num_classes:,} identities. Step {run.step:,} of {total:,}, {state}."
    )


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


def _training(run: Run, drawing: bool) -> Iterator[str]:
    yield page.heading(2, "Training")
    if not run.training:
        yield page.paragraph("No step was logged yet.")
        return
    if drawing:
        curves = {}
        for name, title in NAMES.items():
            epochs = [line.epoch for line in run.training if getattr(line, name) is not None]
            values = _column(run.training, name)
            if any(values):
                curves[title] = epochs, values
        yield page.figure(figures.draw_curves(curves, "epoch"), "Curves of the training by epoch")
    yield page.paragraph(
        "Means over each epoch's lines of metrics.jsonl; the learning rate is the last.", dim=True
    )
    yield page.table("epochs", ["Epoch", *NAMES.values(), "Data wait"], _epochs(run), words=())
    if run.skipped:
        yield page.heading(3, "Skipped steps")
        yield page.paragraph(
            f"{len(run.skipped):,} steps had a loss or a gradient that is not finite and changed "
            f"no weight; the last {min(len(run.skipped), SHOWN_SKIPPED)} are listed."
        )
        yield page.table("skipped", ["Step", "What it was", "Records"], _skipped(run), words=(1, 2))


def _epochs(run: Run) -> Iterator[list[str]]:
    epochs: dict[int, list[TrainingLine]] = {}
    for line in run.training:
        # Epoch 1 ends at 1.0, which is the mark of its last line.
        epochs.setdefault(max(1, math.ceil(line.epoch)), []).append(line)
    for epoch, lines in epochs.items():
        columns = [_column(lines, name) for name in NAMES if name != "lr"]
        means = [_number(fmean(column)) if column else DASH for column in columns]
        means.insert(list(NAMES).index("lr"), _number(lines[-1].lr))
        yield [str(epoch), *means, f"{fmean(_column(lines, 'data_wait')):.1%}"]


def _skipped(run: Run) -> Iterator[list[str]]:
    for line in run.skipped[-SHOWN_SKIPPED:]:
        parts = ", ".join(f"{name} {value}" for name, value in line.not_finite.items())
        yield [f"{line.step:,}", parts, " ".join(line.records)]


def _verification(run: Run, drawing: bool) -> Iterator[str]:
    yield page.heading(2, "Verification")
    if not run.evaluations:
        yield page.paragraph("Nothing was evaluated; name verification sets in evaluation.sets.")
        return
    scores = run.findings.sets if run.findings else ()
    if scores:
        yield from _scores(scores, drawing)
    yield page.heading(3, "Accuracy by epoch")
    names = list(dict.fromkeys(name for line in run.evaluations for name in line.accuracy))
    if drawing:
        curves = {
            name: (
                [line.epoch for line in run.evaluations if name in line.accuracy],
                [line.accuracy[name] for line in run.evaluations if name in line.accuracy],
            )
            for name in names
        }
        yield page.figure(figures.draw_lines(curves, "epoch", "accuracy"), "Accuracy by epoch")
    yield page.table(
        "accuracies",
        ["Epoch", "Step", *names],
        (
            [
                f"{line.epoch:g}",
                f"{line.step:,}",
                *(_percent(line.accuracy.get(name)) for name in names),
            ]
            for line in run.evaluations
        ),
        words=(),
    )


def _scores(scores: Sequence[SetScore], drawing: bool) -> Iterator[str]:
    rates = [far for far in scores[0].tar_at_far if any(s.tar_at_far.get(far) for s in scores)]
    yield page.paragraph(
        "The last weights. Accuracy over ten folds, each at the threshold that is best on the "
        "other nine; TAR at a FAR is left open where there are too few impostor pairs to tell.",
        dim=True,
    )
    yield page.table(
        "verification",
        ["Set", "Pairs", "Accuracy", "± over folds", "AUC", "EER", *(f"TAR@{r}" for r in rates)],
        (
            [
                score.name,
                f"{score.genuine_pairs + score.impostor_pairs:,}",
                f"{score.accuracy:.2%}",
                f"{score.accuracy_std:.2%}",
                f"{score.auc:.4f}",
                f"{score.eer:.2%}",
                *(_percent(score.tar_at_far.get(rate)) for rate in rates),
            ]
            for score in scores
        ),
    )
    for score in scores:
        if score.one_sided_folds:
            yield page.paragraph(
                f"{score.name}: {score.one_sided_folds} of its ten folds hold one kind of pair "
                "only, which biases the accuracy; go by AUC and TAR."
            )
    if drawing:
        roc = figures.draw_roc({score.name: score.roc for score in scores})
        yield page.figure(roc, "Receiver operating characteristic of each verification set")


def _groups(run: Run, drawing: bool) -> Iterator[str]:
    yield page.heading(2, "Targets")
    views = run.findings.groups if run.findings else {}
    if not views:
        told = "No figures before the training has ended."
        without = "Trained without distillation."
        yield page.paragraph(told if run.described.dataset.cache_id else without)
        return
    yield page.paragraph(
        "Sizes of the primary groups of all samples in the cache: how many classes the teacher "
        "tells of an image.",
        dim=True,
    )
    groups = {view: [(s, n) for s, n in counts if s] for view, counts in views.items()}
    if drawing:
        yield page.figure(figures.draw_sizes(groups), "Samples by size of their primary group")
    for view, counts in groups.items():
        skipped = sum(n for size, n in views[view] if not size)
        samples = sum(n for _, n in counts)
        entries = sum(size * n for size, n in counts)
        yield page.paragraph(
            f"{view}: {samples:,} groups of mean size {entries / max(samples, 1):,.1f}; "
            f"{skipped:,} samples skipped by the teacher."
        )
    yield page.table("groups", ["Classes", *groups], _size_rows(groups), words=())


def _size_rows(groups: Mapping[str, Sequence[tuple[int, int]]]) -> Iterator[list[str]]:
    """Samples of each view by size, in ranges that double: 1, 2-3, 4-7 ..."""
    largest = max((size for counts in groups.values() for size, _ in counts), default=0)
    for power in range(largest.bit_length()):
        first, last = 1 << power, min((2 << power) - 1, largest)
        name = f"{first:,}" if first == last else f"{first:,}{DASH}{last:,}"
        yield [
            name,
            *(
                f"{sum(n for size, n in counts if first <= size <= last):,}"
                for counts in groups.values()
            ),
        ]


def _identities(fit: FitSummary | None) -> Iterator[str]:
    yield page.heading(2, "Identities that fit worst")
    if fit is None:
        yield page.paragraph("Not measured: no image of the last epoch was seen.")
        return
    yield page.paragraph(
        "Cosine of an image's embedding to the centre of its own class, as the steps of the last "
        "epoch saw it: the image as it was augmented, the network in training mode, the weights "
        f"of that very step. {fit.images:,} of {fit.of:,} images were measured, their mean is "
        f"{fit.mean:.4f}. A low mean is a hard identity, or wrong labels: look at the images.",
        dim=True,
    )
    yield page.table(
        "identities",
        ["Class", "Images", "Mean cosine", "Its worst images: record key (cosine)"],
        (
            [
                f"{identity.number}",
                f"{identity.images:,}",
                f"{identity.mean:.4f}",
                ", ".join(f"{key} ({cosine:.3f})" for key, cosine in identity.worst),
            ]
            for identity in fit.worst
        ),
        words=(3,),
    )


def _origin(run: Run) -> Iterator[str]:
    described = run.described
    data = described.dataset
    yield page.heading(2, "How it was made")
    yield page.heading(3, "Command")
    yield page.code(shlex.join(described.command) or "not given: trained from Python")
    yield page.heading(3, "Data, machine and versions")
    facts = {
        "Records": data.path,
        "Data set fingerprint": data.dataset,
        "Cache id": data.cache_id or "none: trained without distillation",
        "Parameters": ", ".join(f"{name} {n:,}" for name, n in described.parameters.items()),
        "Ranks": f"{described.ranks:,}",
        "Device": described.device,
        "Precision": described.precision,
        "Versions": ", ".join(f"{name} {number}" for name, number in described.versions.items()),
    }
    rows = ([name, value] for name, value in facts.items())
    yield page.table("origin", ["What", "Value"], rows, words=(0, 1))
    yield page.heading(3, "Configuration")
    yield page.code(run.config)


def _number(value: float | None) -> str:
    """Four figures that matter, without an exponent where people would not write one."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.2%}"
