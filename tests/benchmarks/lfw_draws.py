"""Students of the LFW pack from 64 drawn classes, from all and from none, and a curve over n draws.

    python -m tests.benchmarks.lfw_draws [FOLDER]

Runs the public commands: one cache with 128 draws at temperature 4 from all 4,859 classes, cut to
n by `gkd targets retarget`; one whose groups are all classes, which is plain distillation; and
`--without-kd`. The curve over n is of seed 0. The student is that of lfw_student.toml with
`w_primary` 1, evaluated on the pairs of lfw_fold9.bin with both kinds alternating. As many
students as there are cores are trained at a time, on a thread each. FOLDER keeps caches, runs and
curve.png; what is finished there is not run again.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from gkd.storage.util.torchrun_env import usable_cores
from tests.benchmarks.harness import Bar, report
from tests.benchmarks.lfw_student import (
    CONFIG,
    RECORDS,
    TEACHER,
    gkd,
    in_folder,
    write_alternating,
)

NUM_CLASSES = 4859
COUNTS = (4, 8, 16, 32, 64, 128)
COMMON = ("--teacher", TEACHER, "--preprocess", "imagenet", "--centers", "class-mean")
DRAWS = ("--draws", str(max(COUNTS)))
WHOLE = ("--group-temperature", "4", "--threshold", "1", "--max-group", str(NUM_CLASSES))
JUDGED = ("without", "all", "64 draws")
# The deviation of three students was a third in one run of what it was in another.
SEEDS = range(6)


def caches(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and cache of every teaching."""
    drawn, every = folder / f"draws-{max(COUNTS)}.gkd", folder / "all.gkd"
    gkd("cache-teacher", RECORDS, drawn, *COMMON, *DRAWS)
    gkd("cache-teacher", RECORDS, every, *COMMON, *WHOLE, "--draws", "0")
    yield "without", every
    yield "all", every
    for count in COUNTS:
        target = folder / f"draws-{count}.gkd"
        if not (target / "manifest.json").exists():
            gkd("targets", "retarget", drawn, target, "--draws", count)
        yield f"{count} draws", target


def scores_of(out: Path, cache: Path, pairs: Path, seed: int, *flags: str) -> dict[str, float]:
    """Train one student to its end and verify it."""
    settings = ("--config", CONFIG, "--set", "kd.w_primary=1", "--set", f"train.seed={seed}")
    gkd("train-student", RECORDS, cache, out, *settings, *flags)
    (result,) = json.loads(gkd("evaluate", out, pairs, "--json"))
    return {"accuracy": result["accuracy"], "AUC": result["auc"]}


def bytes_of(cache: Path) -> float:
    """Of a sample and view, all in."""
    stats = json.loads(gkd("targets", "stats", cache, "--json"))
    return float(stats["bytes_per_sample"]) / 2


def run(folder: Path) -> None:
    """The whole measurement in ``folder``."""
    folder.mkdir(exist_ok=True)
    pairs = folder / "alternating.bin"
    write_alternating(pairs)
    stored = dict(caches(folder))
    os.environ["OMP_NUM_THREADS"] = "1"
    students: dict[str, list[Future[dict[str, float]]]] = {}
    ratios: dict[str, float] = {}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for name, cache in stored.items():
            flags = ("--without-kd",) if name == "without" else ()
            students[name] = [
                pool.submit(
                    scores_of,
                    folder / f"{name.replace(' ', '-')}-{seed}",
                    cache,
                    pairs,
                    seed,
                    *flags,
                )
                for seed in (SEEDS if name in JUDGED else SEEDS[:1])
            ]
    scores = {name: [each.result() for each in trained] for name, trained in students.items()}
    for name, cache in stored.items():
        for what in ("accuracy", "AUC"):
            values = [each[what] for each in scores[name]]
            print(f"{name}: {what}", *(f"{value:.4f}" for value in values), file=sys.stderr)
            ratios[f"{what}, {name}"] = mean(values)
        if name != "without":
            ratios[f"bytes a sample and view, {name}"] = bytes_of(cache)
    bars: dict[str, Bar] = {"bytes a sample and view, 64 draws": ("<=", 260)}
    for what in ("accuracy", "AUC"):
        by_name = {name: [each[what] for each in scores[name]] for name in scores}
        spread = max(stdev(by_name[name]) for name in JUDGED)
        short, gain = f"{what}: all less 64 draws / spread", f"{what}: 64 draws' gain / spread"
        ratios[short] = (mean(by_name["all"]) - mean(by_name["64 draws"])) / spread
        ratios[gain] = (mean(by_name["64 draws"]) - mean(by_name["without"])) / spread
        bars |= {short: ("<=", 1.0), gain: (">=", 1.0)}
    plot(folder / "curve.png", ratios)
    report("lfw_draws", ratios, bars)


def plot(path: Path, ratios: dict[str, float]) -> None:
    """Area under the ROC over bytes a sample and view."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [f"{count} draws" for count in COUNTS]
    axes.plot(
        [ratios[f"bytes a sample and view, {name}"] for name in names],
        [ratios[f"AUC, {name}"] for name in names],
        "o-",
    )
    for name in names:
        place = ratios[f"bytes a sample and view, {name}"], ratios[f"AUC, {name}"]
        axes.annotate(name, place, xytext=(4, -12), textcoords="offset points", fontsize=8)
    axes.axhline(ratios["AUC, all"], linestyle="--", label="all 4,859 classes")
    axes.axhline(ratios["AUC, without"], linestyle=":", label="without distillation")
    axes.set(xscale="log", xlabel="bytes a sample and view", ylabel="area under the ROC")
    ticks = [30, 60, 120, 240, 480]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    in_folder(run)
