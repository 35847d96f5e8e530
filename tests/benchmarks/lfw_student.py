"""A student of the LFW pack with and without cached targets, three seeds, on unseen identities.

    python -m tests.benchmarks.lfw_student [FOLDER]

Runs the public commands: one cache from the shared teacher with groups of about two thousand
classes, then the student of lfw_student.toml with the targets and `--without-kd`, each with seeds
0, 1 and 2, each evaluated on lfw_fold9.bin after its last epoch. FOLDER keeps the cache and the
runs, and what is finished there is not run again.

lfw_fold9.bin is one fold of LFW: 300 genuine pairs, then 300 impostors. Cut into ten it gives
folds of one kind, whose thresholds are biased against the fold that they are used for. So the
pairs are evaluated with both kinds alternating, which balances the folds as those of the published
sets are; the accuracy in the file's own order is reported too.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from gkd.trainer.evaluation.bin_file import load_verification_set, write_verification_set
from tests.benchmarks.harness import report
from tests.paths import SHARED_DATA

RECORDS = SHARED_DATA / "lfw"
PAIRS = RECORDS / "lfw_fold9.bin"
TEACHER = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
CONFIG = Path(__file__).with_suffix(".toml")
SEEDS = (0, 1, 2)
BARS = {f"{what}: gain / spread of the seeds": (">=", 1.0) for what in ("accuracy", "AUC")}
GROUPS = ("--group-temperature", "4", "--max-group", "4859", "--draws", "0")


def in_folder(run: Callable[[Path], None]) -> None:
    """Run in the folder that the command names, or in one that goes away."""
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))


def run(folder: Path) -> None:
    """Cache once, train six students, report the gain over the seeds' standard deviation."""
    targets, pairs = folder / "lfw.gkd", folder / "alternating.bin"
    teacher = ("--teacher", TEACHER, "--preprocess", "imagenet", "--centers", "class-mean")
    gkd("cache-teacher", RECORDS, targets, *teacher, *GROUPS)
    write_alternating(pairs)
    kinds: dict[str, tuple[str, ...]] = {"gkd": (), "without": ("--without-kd",)}
    scores = {
        kind: [scores_of(folder / f"{kind}-{seed}", targets, pairs, seed, *flags) for seed in SEEDS]
        for kind, flags in kinds.items()
    }
    ratios: dict[str, float] = {}
    for what in scores["gkd"][0]:
        values = {kind: [each[what] for each in scores[kind]] for kind in kinds}
        for kind in kinds:
            listed = ", ".join(f"{value:.4f}" for value in values[kind])
            print(f"{what}, {kind}: {listed}", file=sys.stderr)
            ratios[f"{what}, {kind}"] = mean(values[kind])
        gain = mean(values["gkd"]) - mean(values["without"])
        spread = max(map(stdev, values.values()))
        ratios[f"{what}: gain / spread of the seeds"] = gain / spread
    report("lfw_student", ratios, BARS)


def write_alternating(path: Path) -> None:
    """The shared pairs with genuine ones and impostors in turn."""
    pairs = load_verification_set(PAIRS)
    order = np.stack([np.flatnonzero(pairs.issame), np.flatnonzero(~pairs.issame)], 1).ravel()
    images = [pairs.images[2 * pair + side] for pair in order.tolist() for side in (0, 1)]
    write_verification_set(path, images, pairs.issame[order])


def scores_of(out: Path, targets: Path, pairs: Path, seed: int, *flags: str) -> dict[str, float]:
    """Train one student to its end and verify it."""
    settings = ("--config", CONFIG, "--set", f"train.seed={seed}")
    gkd("train-student", RECORDS, targets, out, *settings, *flags)
    balanced, sorted_ = json.loads(gkd("evaluate", out, pairs, PAIRS, "--json"))
    return {
        "accuracy": balanced["accuracy"],
        "AUC": balanced["auc"],
        "accuracy in the order of the file": sorted_["accuracy"],
    }


def gkd(*arguments: object) -> str:
    """Run a command of gkd and return what it prints; its progress goes to our stderr."""
    command = [sys.executable, "-m", "gkd.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    in_folder(run)
